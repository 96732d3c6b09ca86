"""The float64 reference of a large model, whose weights are widened block by block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from kilodelta import memory
from kilodelta.errors import InputError
from kilodelta.models import open_model
from kilodelta.verify.parity import plan
from kilodelta.verify.runners import blockwise
from kilodelta.verify.runners.torch_runner import TorchRunner
from tests.support import pico


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model with blocks counts as large."""
    monkeypatch.setattr(blockwise, "LARGE", 0)


def run(module: nn.Module, ids: np.ndarray, name: str = "logits") -> np.ndarray:
    runner = TorchRunner(module, [name], precision="float64", device="cpu")
    result: np.ndarray = runner.run({"input_ids": ids})[name]
    return result


@pytest.mark.parametrize("make", [pico.llama, pico.gpt2])
def test_outputs_are_those_of_the_whole_model_bit_for_bit(
    make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tied heads and computed buffers included; the model itself stays as it is."""
    module = open_model(make(tmp_path / "m")).view()  # type: ignore[operator]
    ids = np.random.default_rng(0).integers(4, 40, (3, 7))
    wanted = run(module, ids)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    monkeypatch.setattr(blockwise, "LARGE", 0)
    calls: list[nn.Module] = []
    real = blockwise.widened

    def watched(module: nn.Module) -> nn.Module:
        calls.append(module)
        return real(module)

    monkeypatch.setattr(blockwise, "widened", watched)
    found = run(module, ids)
    assert calls == [module]
    assert found.dtype == np.float64
    assert np.array_equal(found, wanted)
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].dtype == before[name].dtype for name in before)


class Blocks(nn.Module):
    """Three blocks of 100 weights between layers of 20, each looking at what is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 10, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(10, 10, bias=False) for _ in range(3))
        self.last = nn.Linear(10, 2, bias=False)
        self.wide: list[int] = []
        for block in self.blocks:
            block.register_forward_hook(self.look)

    def look(self, *call: object) -> None:
        wide = (p.numel() for p in self.parameters() if p.dtype == torch.float64)
        self.wide.append(sum(wide))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return {"y": self.last(x)}


@pytest.mark.usefixtures("large")
def test_one_block_is_wide_at_a_time() -> None:
    module = Blocks().eval()
    made = blockwise.widened(module)
    for block in made.blocks:  # type: ignore[union-attr]
        block._forward_hooks.clear()  # those of `module` look at `module`
        block.register_forward_pre_hook(made.look)
        parts = [h for h in block._forward_pre_hooks.values() if hasattr(h, "__self__")]
        assert parts
        block.register_forward_hook(parts[0].__self__.on_leave, always_call=True)
    with torch.inference_mode():
        made(torch.ones(1, 2, dtype=torch.float64))
    assert made.wide == [140, 140, 140]
    assert sum(p.numel() for p in made.parameters() if p.dtype == torch.float64) == 40
    assert blockwise.needed(module) == 8 * 140
    assert not any(p.dtype == torch.float64 for p in module.parameters())


class Reaching(Blocks):
    """Uses a block's weights from outside of the block."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        for block in self.blocks:
            x = torch.nn.functional.linear(x, block.get_parameter("weight"))
        return {"y": self.last(x)}


@pytest.mark.usefixtures("large")
def test_a_model_that_reaches_into_its_blocks_is_widened_as_a_whole() -> None:
    module = Reaching().eval()
    runner = TorchRunner(module, ["y"], precision="float64", device="cpu")
    found = runner.run({"x": np.ones((1, 2))})["y"]
    with torch.inference_mode():
        wanted = module.double()(torch.ones(1, 2, dtype=torch.float64))["y"].numpy()
    assert np.array_equal(found, wanted)


@pytest.mark.usefixtures("large")
def test_a_block_that_fails_is_left_narrow() -> None:
    made = blockwise.widened(Blocks().eval())
    with pytest.raises(RuntimeError), torch.inference_mode():
        made.get_submodule("blocks.1")(torch.ones(1, 3, dtype=torch.float64))
    assert made.get_parameter("blocks.1.weight").dtype == torch.float32


def test_weights_that_do_not_fit_are_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 100)
    shapes = {"x": ((1, 2), (1, 2), (1, 2))}
    with pytest.raises(InputError, match=r"weights take 2\.7e-06 GB in float64, and 1e-07 GB"):
        plan.plan(Blocks().eval(), ["y"], {"x": np.ones((1, 2))}, shapes)
