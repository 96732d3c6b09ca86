"""The factors of an update: what their products with activations are, and what they cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kilodelta.compress.training import train
from kilodelta.compress.training.update import SKINNY, FactoredUpdate
from kilodelta.format.methods import UniLora
from kilodelta.format.methods.unilora.train import UniLoraFactors


@pytest.mark.parametrize("inner", [1, 4, SKINNY, SKINNY + 1])
@pytest.mark.parametrize("diagonals", [False, True])
def test_activations_times_factors(inner: int, diagonals: bool) -> None:
    """y + x right diag(i) left^T diag(r) and its gradients, against dW in float64."""
    torch.manual_seed(inner)
    x, y, gradient = torch.randn(7, 5), torch.randn(7, 6), torch.randn(7, 6)
    tensors = {"left": torch.randn(6, inner), "right": torch.randn(5, inner)}
    if diagonals:
        tensors |= {"inner": torch.randn(inner), "rows": torch.randn(6)}
    found: list[dict[str, Tensor]] = []
    for dtype in (torch.float32, torch.float64):
        given = {**tensors, "x": x, "y": y}
        leaves = {n: v.detach().to(dtype).requires_grad_() for n, v in given.items()}
        update = FactoredUpdate(**{name: leaves[name] for name in tensors})
        if dtype == torch.float32:
            total = update.add_to(leaves["y"], leaves["x"])
        else:
            one = torch.ones((), dtype=dtype)
            middle = torch.diag(leaves.get("inner", one.expand(inner)))
            outer = torch.diag(leaves.get("rows", one.expand(6)))
            dense = outer @ leaves["left"] @ middle @ leaves["right"].t()
            total = leaves["y"] + leaves["x"] @ dense.t()
        total.backward(gradient.to(dtype))  # type: ignore[no-untyped-call]
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        found.append({"": total.detach(), **gradients})
    assert found[0].keys() == found[1].keys() == {"", "x", "y", *tensors}
    for name, value in found[0].items():
        # Sums of at most 7 * 17 products of normal numbers, in any order.
        assert torch.allclose(value.double(), found[1][name], rtol=1e-5, atol=1e-4), name


def test_skinny_factors_lie_along_the_long_axis() -> None:
    for inner, along in ((4, True), (SKINNY, True), (SKINNY + 1, False)):
        update = FactoredUpdate(left=torch.randn(60, inner), right=torch.randn(50, inner))
        left, right = update._for_activations()
        assert (left.stride(0) == 1, right.stride(0) == 1) == (along, along)
        assert torch.equal(left, update.left)
        assert torch.equal(right, update.right)


class Two(nn.Module):
    """Two layers, each computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Any = checkpoint(self.first, x, use_reentrant=False)
        output: Tensor = checkpoint(self.second, hidden, use_reentrant=False)
        return output


def test_uni_lora_gathers_its_factors_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's gradients come last: what all layers share must last until then."""
    calls: Counter[str] = Counter()
    prepare = UniLoraFactors.prepare

    def counted(self: UniLoraFactors, values: Any) -> tuple[Tensor, ...]:
        calls["prepare"] += 1
        return prepare(self, values)

    monkeypatch.setattr(UniLoraFactors, "prepare", counted)
    model = train.attach(Two(), UniLora(rank=2, bases=40), "*.weight", seed=3)
    for step in (1, 2):
        model(torch.randn(5, 24)).square().sum().backward()
        assert calls["prepare"] == step
