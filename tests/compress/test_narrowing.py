"""Products in bfloat16 or 8 bits with frozen float32 weights, while a training step is taken."""

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
from kilodelta.compress.training import layers, train
from kilodelta.compress.training.products import narrowing
from kilodelta.compress.training.products.narrowing import Beside, Narrowed, can_narrow
from kilodelta.compress.training.products.rounded import LONGEST, Bfloat16, Int8, Products
from kilodelta.compress.training.update import FactoredUpdate
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.methods import Lora, Method, UniLora, Vera
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
    with Narrowed([layer], Bfloat16()).used():
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
    assert can_narrow(nn.Sequential(*others, large), Bfloat16()) == [large]
    with torch.no_grad():  # nothing trains here
        assert can_narrow(nn.Sequential(*others, large), Bfloat16()) == [trained, large]
    wide = nn.Linear(LONGEST + 1, 1, bias=False).requires_grad_(False)
    assert can_narrow(wide, Bfloat16()) == [wide]
    assert can_narrow(wide, Int8()) == []


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """The formula, float64: a row's numbers as multiples of a 127th of its largest."""
    step = rows.double().abs().amax(1, keepdim=True) / 127
    return (rows.double() / step.clamp(min=1e-300)).round() * step


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_in_8_bits_is_that_of_codes_and_scales(bias: bool) -> None:
    torch.manual_seed(0)
    layer = frozen(11, 7, bias=bias)
    with torch.no_grad():
        layer.weight[3] = 0
    given = (torch.randn(2, 3, 7) * 10.0 ** torch.arange(3)[:, None]).requires_grad_()
    grown = torch.randn(2, 3, 11)
    grown[1, 1] = 0
    with Narrowed([layer], Int8()).used():
        made = layer(given)
        made.backward(grown)
    rows, weight, g = (t.detach().reshape(-1, t.shape[-1]) for t in (given, layer.weight, grown))
    exact = rounded(rows) @ rounded(weight).t() + (layer.bias.detach().double() if bias else 0)
    torch.testing.assert_close(made.view(6, 11).double(), exact, rtol=1e-6, atol=1e-6)
    back = rounded(g) @ rounded(weight.t()).t()
    assert given.grad is not None
    torch.testing.assert_close(given.grad.view(6, 7).double(), back, rtol=1e-6, atol=1e-6)
    if bias:
        assert layer.bias.grad is not None
        torch.testing.assert_close(layer.bias.grad, grown.sum((0, 1)))
    torch.testing.assert_close(layer(given), nn.functional.linear(given, layer.weight, layer.bias))


def test_the_longest_sum_of_8_bit_products_is_exact() -> None:
    weight, how = torch.ones(1, LONGEST), Int8()
    for sign in (1.0, -1.0):
        coded = how.rounded(torch.full((1, LONGEST), sign))
        made = torch._int_mm(coded.codes, how._coded(weight, back=False).codes)
        assert made.item() == sign * LONGEST * 127**2


@pytest.mark.parametrize("stride", [0, 1, 7, 64])
def test_a_single_row_may_have_any_stride(stride: int) -> None:
    torch.manual_seed(0)
    for layer in (frozen(64, 7, bias=False), frozen(1, 7, bias=False)):
        given = torch.randn(7).as_strided((1, 7), (stride, 1))
        grown = torch.ones(layer.out_features).as_strided((1, layer.out_features), (stride, 1))
        leaf = given.requires_grad_()
        with Narrowed([layer], Int8()).used():
            made = layer(leaf)
        (back,) = torch.autograd.grad(made, leaf, grown)
        weight = layer.weight.detach()
        exact = rounded(given.detach()) @ rounded(weight).t()
        torch.testing.assert_close(made.double(), exact, rtol=1e-6, atol=1e-6)
        wanted = rounded(grown) @ rounded(weight.t()).t()
        torch.testing.assert_close(back.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_so(bad: float) -> None:
    layer = frozen(4, 3, bias=False)
    given = torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]])
    with Narrowed([layer], Int8()).used():
        made = layer(given)
    assert not made[0].isfinite().any()
    assert made[1].isfinite().all()


@pytest.mark.parametrize("how", [Bfloat16, Int8])
def test_an_input_is_rounded_once_for_all_layers_that_take_it(
    how: type[Products], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [frozen(5, 4, bias=False) for _ in range(3)]
    given = torch.randn(2, 4)
    apart = []
    for layer in layers:
        with Narrowed([layer], how()).used():
            apart.append(layer(given))
    asked = how()
    seen: list[torch.Tensor] = []
    real = asked.rounded

    def watched(rows: torch.Tensor) -> Any:
        seen.append(rows)
        return real(rows)

    monkeypatch.setattr(asked, "rounded", watched)
    with Narrowed(layers, asked).used():
        together = [layer(given) for layer in layers]
        assert all(map(torch.equal, together, apart))
        count = len(seen)
        given.mul_(2)  # the same tensor with other values is another input
        assert torch.equal(layers[0](given), 2 * apart[0])
    assert len(seen) == count + 1
    assert sum(rows.shape == (2, 4) for rows in seen[:count]) == 1


def test_values_that_take_a_weight_s_place_have_codes_of_their_own() -> None:
    layer, given = frozen(5, 4, bias=False), torch.randn(2, 4)
    own, other = layer.weight.data, torch.randn(5, 4)
    narrow = Narrowed([layer], Int8())
    made = []
    for values in (own, other, own):
        layer.weight.data = values
        with narrow.used():
            made.append(layer(given))
    assert torch.equal(made[0], made[2])
    exact = rounded(given) @ rounded(other).t()
    torch.testing.assert_close(made[1].double(), exact, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        layer.weight.mul_(3)  # in place: its codes are no longer these
    with narrow.used():
        torch.testing.assert_close(layer(given), 3 * made[0])


def test_a_layer_with_w_plus_dw_in_its_place_keeps_float32() -> None:
    layer, given = frozen(5, 5, bias=False), torch.randn(2, 5)
    total = torch.randn(5, 5, requires_grad=True)
    layer.__dict__["weight"] = total
    with Narrowed([layer], Bfloat16()).used():
        made = layer(given)
    made.sum().backward()
    assert torch.equal(made, given @ total.t())
    assert total.grad is not None


@pytest.mark.parametrize("how", [Bfloat16, Int8])
@pytest.mark.parametrize("bias", [True, False])
def test_an_update_beside_a_product_is_added_with_its_gradients(
    how: type[Products], bias: bool
) -> None:
    torch.manual_seed(0)
    layer = frozen(11, 7, bias=bias)
    given, grown = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 11)
    left, right = torch.randn(11, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    trained = [given, left, right, *([layer.bias] if bias else [])]
    with Narrowed([layer], how()).used():
        apart = layer(given) + given @ right @ left.t()
        wanted = torch.autograd.grad(apart, trained, grown)
        beside = layer.__dict__[narrowing.BESIDE] = Beside(left, right)
        made = layer(given)
    del layer.__dict__[narrowing.BESIDE]
    assert beside.added
    torch.testing.assert_close(made, apart)
    found = torch.autograd.grad(made, trained, grown)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kept", ["given", "left", "right"])
def test_a_gradient_that_nobody_asks_for_is_left_out(kept: str) -> None:
    layer, tensors = frozen(5, 4, bias=False), {}
    for name, shape in {"given": (3, 4), "left": (5, 2), "right": (4, 2)}.items():
        tensors[name] = torch.randn(shape, requires_grad=name == kept)
    layer.__dict__[narrowing.BESIDE] = Beside(tensors["left"], tensors["right"])
    with Narrowed([layer], Bfloat16()).used():
        layer(tensors["given"]).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [kept]


@pytest.mark.parametrize(
    "method", [UniLora(rank=2, bases=50), Lora(rank=2), Vera(rank=2)], ids=lambda m: m.name
)
@pytest.mark.parametrize("how", [Bfloat16, Int8])
def test_an_attached_update_is_added_once(
    method: Method, how: type[Products], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the product, or by a hook where it has diagonals (VeRA's)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 20))
    given = torch.randn(64, 40)
    train.attach(model, method, "*.weight", seed=1)
    monkeypatch.setattr(narrowing, "SMALLEST", 1)
    with torch.no_grad():
        for parameter in train.attached(model).parameters():
            parameter.add_(torch.randn(parameter.shape) / 10)
    trained = [p for p in model.parameters() if p.requires_grad]
    narrow = Narrowed.of(model, how.name)
    assert narrow is not None
    assert len(narrow.layers) == 2
    added: list[bool] = []

    def run() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        with narrow.used():
            made = model(given)
        return made, torch.autograd.grad(made.square().sum(), trained)

    real = narrowing.Beside

    def offered(left: torch.Tensor, right: torch.Tensor) -> narrowing.Beside:
        added.append(True)
        return real(left, right)

    monkeypatch.setattr(layers, "Beside", offered)
    made, slopes = run()
    assert bool(added) is (method.name != "vera")
    monkeypatch.setattr(FactoredUpdate, "is_thin", False)
    wanted, wanted_slopes = run()
    torch.testing.assert_close(made, wanted)
    for ours, theirs in zip(slopes, wanted_slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not any(name.startswith("_kilodelta") for m in model for name in m.__dict__)


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


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with units for both types, on which layers of any size are large."""
    monkeypatch.setattr(placement, "_cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(placement, "_cpu_has_int8", lambda: True)
    monkeypatch.setattr(narrowing, "SMALLEST", 1)


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("dtype", ["mixed", "mixed-int8"])
def test_steps_multiply_in_a_narrow_type_and_measurements_do_not(
    dtype: str,
    models: tuple[Path, Path],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grown: list[bool] = []
    real = narrowing._forward

    def watched(layer: nn.Linear, *rest: Any) -> torch.Tensor:
        grown.append(torch.is_grad_enabled())
        return real(layer, *rest)

    monkeypatch.setattr(narrowing, "_forward", watched)
    plain = make(models, texts, tmp_path / "plain.kd", dtype="fp32")
    assert not grown
    mixed = make(models, texts, tmp_path / "mixed.kd", dtype=dtype)
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
    monkeypatch.setattr(placement, "_cpu_has_int8", lambda: True)
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
    for dtype in ("fp32", "mixed-int8"):
        with pytest.raises(InputError, match="products"):
            make(models, texts, out, dtype=dtype, resume=True)
    assert make(models, texts, out, dtype="mixed", resume=True).after is not None


@pytest.mark.parametrize(
    ("dtype", "units", "type_"),
    [("mixed", "_cpu_has_bfloat16", "bfloat16"), ("mixed-int8", "_cpu_has_int8", "int8")],
)
def test_a_narrow_type_is_refused_where_it_brings_nothing(
    dtype: str,
    units: str,
    type_: str,
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = Checkpoint.open(models[0])
    monkeypatch.setattr(placement, units, lambda: False)
    with pytest.raises(InputError, match=f"{type_}, for which this device has no units") as caught:
        choose_placement("cpu", dtype, base)
    assert caught.value.fix == "give --dtype fp32 or auto"
    monkeypatch.setattr(placement, units, lambda: True)
    assert choose_placement("cpu", dtype, base).name == dtype
    file = pico.llama(tmp_path / "narrow") / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"is for a base in float32, and .* is stored in bf16"):
        choose_placement("cpu", dtype, Checkpoint.open(file.parent))


@pytest.mark.parametrize(
    ("known", "by_older", "fast"),
    [
        ({"avx512_vnni": True}, False, True),
        ({"avx_vnni": True}, False, True),
        ({"amx_int8": True}, False, True),
        ({"avx512_f": True}, True, False),
        ({}, True, True),  # a torch that says nothing of capabilities
        ({}, False, False),
    ],
)
def test_a_processor_is_fast_in_8_bits_by_its_units(
    known: dict[str, Any], by_older: bool, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: by_older)
    assert placement._cpu_has_int8() is fast


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
