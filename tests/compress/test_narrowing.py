"""Products in bfloat16 with frozen float32 weights, while a training step is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kilodelta.compress import Options, Report, compress
from kilodelta.compress.distill import placement
from kilodelta.compress.distill.placement import choose_placement
from kilodelta.compress.training.products import narrowing
from kilodelta.compress.training.products.narrowing import can_narrow, narrowed
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from tests.support import pico


def frozen(out: int, in_: int, *, bias: bool) -> nn.Linear:
    """A layer of random weights, of which only a bias trains."""
    layer = nn.Linear(in_, out, bias=bias)
    layer.weight.requires_grad_(False)
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradient_are_those_of_rounded_factors(bias: bool) -> None:
    torch.manual_seed(0)
    layer = frozen(11, 7, bias=bias)
    given = torch.randn(2, 3, 7, requires_grad=True)
    grown = torch.randn(2, 3, 11)
    with narrowed([layer]):
        made = layer(given)
        made.backward(grown)
    narrow = [t.detach().bfloat16().double() for t in (given, layer.weight, grown)]
    x, weight, g = narrow
    exact = x @ weight.t() + (layer.bias.detach().double() if bias else 0)
    assert made.dtype == torch.float32
    # A product is summed in float32 and rounded to bfloat16 once: half a unit of its 8 bits.
    sizes = x.abs() @ weight.abs().t()
    assert ((made.double() - exact).abs() <= 2**-8 * sizes).all()
    assert given.grad is not None
    wanted = g @ weight
    assert ((given.grad.double() - wanted).abs() <= 2**-8 * (g.abs() @ weight.abs())).all()
    if bias:
        assert layer.bias.grad is not None
        torch.testing.assert_close(layer.bias.grad, grown.sum((0, 1)))
    assert layer.weight.grad is None
    # And float32 is back: the difference is that of the rounded factors.
    assert not torch.equal(layer(given), made)
    torch.testing.assert_close(layer(given), nn.functional.linear(given, layer.weight, layer.bias))


def test_only_large_frozen_float32_layers_multiply_so() -> None:
    large = frozen(256, 256, bias=True)
    trained, late, half = nn.Linear(256, 256), frozen(256, 256, bias=False), nn.Linear(256, 256)
    half.requires_grad_(False).bfloat16()
    late.__dict__["forward"] = late.forward  # a head that is computed in the loss
    others = [trained, late, half, frozen(255, 257, bias=False), nn.Conv1d(256, 256, 1)]
    assert can_narrow(nn.Sequential(*others, large)) == [large]


def test_a_layer_with_w_plus_dw_in_its_place_keeps_float32() -> None:
    layer, given = frozen(5, 5, bias=False), torch.randn(2, 5)
    total = torch.randn(5, 5, requires_grad=True)
    layer.__dict__["weight"] = total
    with narrowed([layer]):
        made = layer(given)
    made.sum().backward()
    assert torch.equal(made, given @ total.t())
    assert total.grad is not None


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    base = pico.llama(tmp_path / "base")
    return base, pico.tuned(base, tmp_path / "tuned", size=0.3)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return pico.texts(tmp_path / "texts.txt", 64)


def make(models: tuple[Path, Path], texts: Path, out: Path, **chosen: Any) -> Report:
    resume = chosen.pop("resume", False)
    options = Options(steps=8, batch=8, budget=4000, held_out=16, device="cpu", **chosen)
    return compress(*models, out, inputs=texts, options=options, resume=resume)


def test_steps_multiply_in_bfloat16_and_measurements_do_not(
    models: tuple[Path, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(narrowing, "SMALLEST", 1)
    grown: list[bool] = []
    real = narrowing._forward

    def watched(layer: nn.Linear, given: torch.Tensor) -> torch.Tensor:
        grown.append(torch.is_grad_enabled())
        return real(layer, given)

    monkeypatch.setattr(narrowing, "_forward", watched)
    plain = make(models, texts, tmp_path / "plain.kd", dtype="fp32")
    assert not grown
    mixed = make(models, texts, tmp_path / "mixed.kd", dtype="mixed")
    assert grown
    assert all(grown)
    assert mixed.before == plain.before
    assert (tmp_path / "mixed.kd").read_bytes() != (tmp_path / "plain.kd").read_bytes()
    assert mixed.after is not None
    assert plain.after is not None
    assert mixed.after.divergence == pytest.approx(plain.after.divergence, rel=0.05)


def test_a_run_is_not_resumed_in_other_products(
    models: tuple[Path, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_cpu_has_bfloat16", lambda: True)
    out, real = tmp_path / "a.kd", compress.__globals__["distill"]

    def cut(*args: Any, **kwargs: Any) -> Any:
        from kilodelta.compress.distill.learn import state
        from kilodelta.compress.distill.learn.steps import Run

        student, data, schedule, progress = args
        state.save(kwargs["kept"], kwargs["facts"], Run(student, data, schedule, progress).state())
        raise KeyboardInterrupt

    monkeypatch.setitem(compress.__globals__, "distill", cut)
    with pytest.raises(KeyboardInterrupt):
        make(models, texts, out, dtype="mixed")
    monkeypatch.setitem(compress.__globals__, "distill", real)
    with pytest.raises(InputError, match="products"):
        make(models, texts, out, dtype="fp32", resume=True)
    assert make(models, texts, out, dtype="mixed", resume=True).after is not None


def test_mixed_is_refused_where_it_brings_nothing(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Checkpoint.open(models[0])
    monkeypatch.setattr(placement, "_cpu_has_bfloat16", lambda: False)
    with pytest.raises(InputError, match="bfloat16, for which this device has no units") as caught:
        choose_placement("cpu", "mixed", base)
    assert caught.value.fix == "give --dtype fp32 or auto"
    monkeypatch.setattr(placement, "_cpu_has_bfloat16", lambda: True)
    assert choose_placement("cpu", "mixed", base).name == "mixed"
    file = pico.llama(tmp_path / "narrow") / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"is for a base in float32, and .* is stored in bf16"):
        choose_placement("cpu", "mixed", Checkpoint.open(file.parent))


@pytest.mark.parametrize(
    ("known", "platform", "fast"),
    [
        ({"architecture": "aarch64", "bf16": True}, "linux", True),
        ({"architecture": "aarch64", "bf16": False}, "linux", False),
        ({"architecture": "arm64", "bf16": True}, "darwin", False),
    ],
)
def test_an_arm_processor_is_fast_in_bfloat16_by_its_units(
    known: dict[str, Any], platform: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a double of what torch says: no ARM machine has run it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(placement.sys, "platform", platform)  # type: ignore[attr-defined]
    assert placement._cpu_has_bfloat16() is fast
