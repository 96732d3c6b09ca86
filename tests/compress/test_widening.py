"""Weights that stay in the file's type and pages while a student computes in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kilodelta.compress import Options, Report, compress
from kilodelta.compress.distill import student as students
from kilodelta.compress.distill.learn.rows import Rows
from kilodelta.compress.distill.processes.ranks import ALONE
from kilodelta.compress.distill.student import weights_as_stored
from kilodelta.compress.training import train
from kilodelta.compress.training.layers import sum_is_cheaper
from kilodelta.compress.training.products.widening import can_widen, widened
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.models.loaded import LoadedModel
from tests.support import pico


class Net(nn.Module):
    """Two linear layers, the second of which may be used by hand."""

    def __init__(self, by_hand: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.by_hand = nn.Linear(6, 8), nn.Linear(8, 5), by_hand
        for parameter in self.parameters():
            parameter.requires_grad_(False).copy_(parameter.bfloat16())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x).tanh()
        if self.by_hand:
            return {"y": hidden @ self.second.weight.t()}
        return {"y": self.second(hidden)}


def stored(module: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight.bfloat16() for name, layer in can_widen(module).items()}


def passes(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a product's outputs and the gradient of its input."""
    given = x.clone().requires_grad_()
    y = module(given)["y"]
    y.square().sum().backward()
    assert given.grad is not None
    return y.detach(), given.grad


def test_widened_layers_compute_the_same_bits_forward_and_backward() -> None:
    module, x = Net(), torch.randn(3, 7, 6)
    before = passes(module, x)
    with widened(can_widen(module), stored(module)):
        assert module.second.weight.untyped_storage().nbytes() == 4
        assert module.second.weight.shape == (5, 8)
        within = passes(module, x)
    after = passes(module, x)
    assert module.second.weight.untyped_storage().nbytes() == 4 * 5 * 8
    for one, two, three in zip(before, within, after, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize(("rank", "is_sum"), [(1, False), (4, True)])
def test_updates_of_widened_layers_have_the_same_gradients(rank: int, is_sum: bool) -> None:
    module, x = Net(), torch.randn(21, 6)
    train.attach(module, train.Lora(rank=rank), "*.weight", seed=1)
    with torch.no_grad():
        trained = [p for p in module.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter))
    for place in train.attached(module).places:
        update = train.attached(module).update(place.target.index)
        assert sum_is_cheaper(len(x), update) is is_sum
    found: list[list[Tensor]] = []
    for block in (nullcontext(), widened(can_widen(module), stored(module))):
        module.zero_grad()
        with block:
            passes(module, x)
        found.append([p.grad.clone() for p in trained if p.grad is not None])
    assert len(found[0]) == len(trained)
    assert all(map(torch.equal, *found))


def test_layers_that_share_a_weight_or_train_keep_their_copies() -> None:
    layers = [nn.Linear(4, 4).requires_grad_(False) for _ in range(5)]
    embedding = nn.Embedding(4, 4).requires_grad_(False)
    module = nn.Sequential(embedding, *layers)
    layers[0].weight = embedding.weight  # a tied head
    layers[1].weight.requires_grad_()
    layers[2].weight.data = layers[3].weight.data
    assert list(can_widen(module)) == ["5.weight"]
    assert not can_widen(module, trained=["5.weight"])


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_model_that_uses_a_weight_by_hand_keeps_its_copies(by_hand: bool, tmp_path: Path) -> None:
    module = Net(by_hand)
    save_file({n: v.bfloat16() for n, v in module.state_dict().items()}, tmp_path / "b.safetensors")
    names = {name: name for name in module.state_dict()}
    job: Any = SimpleNamespace(
        precisions=(),
        pair=SimpleNamespace(base=Checkpoint.open(tmp_path / "b.safetensors"), names=names),
        split=SimpleNamespace(extras=()),
    )
    data: Any = SimpleNamespace(
        ranks=ALONE,
        rows=Rows(({"x": torch.randn(2, 6)},), {}),
        learned=[0],
        survey=SimpleNamespace(one_row=False),
    )
    loaded = LoadedModel(source="net", module=module, kind="any", names=names)
    whole = module.first.weight.clone()
    with weights_as_stored(job, loaded, data):
        held = {layer.weight.untyped_storage().nbytes() for layer in can_widen(module).values()}
        widens = "forward" in module.first.__dict__
    assert widens is not by_hand
    assert held == ({4 * 48, 4 * 40} if by_hand else set())
    assert torch.equal(module.first.weight, whole)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders that store bfloat16."""
    base = pico.llama(tmp_path / "base")
    folders = base, pico.tuned(base, tmp_path / "tuned", size=0.3)
    for folder in folders:
        place = folder / "model.safetensors"
        narrow = {name: values.bfloat16() for name, values in load_file(place).items()}
        save_file(narrow, place, metadata={"format": "pt"})
    return folders


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note for how many layers each training widens."""
    counts: list[int] = []

    @contextmanager
    def noted(layers: Any, found: dict[str, Tensor]) -> Iterator[None]:
        counts.append(len(found))
        with widened(layers, found):
            yield

    monkeypatch.setattr(students, "widened", noted)
    return counts


def make(models: tuple[Path, Path], out: Path, **options: Any) -> Report:
    texts = out.with_name("texts.txt")
    words = pico.WORDS.split()
    texts.write_text("\n".join(" ".join(words[i % 9 : i % 9 + 4]) for i in range(32)) + "\n")
    chosen = Options(**{"steps": 4, "batch": 8, "held_out": 8, "budget": 3000, **options})
    return compress(*models, out, inputs=texts, options=chosen)


def test_a_compression_on_mapped_weights_makes_the_same_file(
    models: tuple[Path, Path],
    used: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = make(models, tmp_path / "a.kd", dtype="fp32")
    assert used == [2 * 7]  # every matrix of both layers; embedding and head are one tensor
    nothing: Callable[..., dict[str, Tensor]] = lambda job, student: {}  # noqa: E731
    monkeypatch.setattr(students, "_stored", nothing)
    two = make(models, tmp_path / "b.kd", dtype="fp32")
    assert used == [2 * 7]
    assert (tmp_path / "a.kd").read_bytes() == (tmp_path / "b.kd").read_bytes()
    assert one.after == two.after
