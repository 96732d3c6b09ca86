"""The yardstick of a limit: what rounding can do to a model, and never a fault of the same size."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kilodelta.device.golden import reference as device_reference
from kilodelta.device.golden.golden import Golden
from kilodelta.device.golden.probe import require_close
from kilodelta.errors import ProofError
from kilodelta.models.loaded import LoadedModel
from kilodelta.verify.parity.cases import Case
from kilodelta.verify.parity.gate import limit, widened
from kilodelta.verify.parity.judge import judge
from kilodelta.verify.parity.metrics import Metrics, compare
from kilodelta.verify.parity.reference import Reference
from kilodelta.verify.parity.result import Result
from kilodelta.verify.runners.rounding_noise import RoundingNoise
from kilodelta.verify.runners.runner import Arrays, Batch
from kilodelta.verify.runners.torch_runner import TorchRunner

TERMS = 64


class Similarity(nn.Module):
    """One logit: the sum of large terms that almost cancel, as of two unlike embeddings.

    Terms have ten significant bits, so torch adds them without any rounding, and is no measure.
    """

    def __init__(self, change: float = 0.0) -> None:
        super().__init__()
        chance = torch.Generator().manual_seed(0)
        terms = torch.randint(513, 1024, (TERMS,), generator=chance) / 1024
        terms[1::2] = -terms[::2]
        terms[-1] += 1 / 1024
        self.weight = nn.Parameter(terms + change * torch.arange(TERMS).eq(5))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x @ self.weight[:, None]}


class Rounds:
    """A runtime that keeps each operand one rounding off: what correct programs differ by."""

    name = "rounds"

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach().double().numpy()

    def available(self) -> None:
        return None

    def run(self, batch: Batch) -> Arrays:
        off = np.random.default_rng(3).choice([-1.0, 1.0], TERMS) * 2.0**-24
        return {"logits": (batch["x"] * (1 + off)) @ self.weight[:, None]}


def ones() -> NDArray[np.float32]:
    """A row whose entries are no whole numbers, and products with ten bits."""
    return np.full((1, TERMS), 1.5, np.float32)


def judged(runner: Rounds, merged: nn.Module) -> Result:
    against = Reference(
        merged,
        Similarity(0.25),
        outputs=["logits"],
        cases=[Case(name="smallest", batch={"x": ones()})],
    )
    return judge(runner, against, artefact="file", precision="float32")


def test_a_logit_near_zero_is_held_to_its_condition() -> None:
    merged = Similarity().eval()
    result = judged(Rounds(merged.weight), merged)
    [check] = result.checks
    assert check.torch.relative_l2 == 0.0  # torch has all the luck
    assert check.error.relative_l2 > 5 * limit([check.torch], "float32").relative_l2
    assert result.status == "passed", result.reasons()


@pytest.mark.parametrize("change", [1e-4, -1e-4, 1e-5])
def test_a_changed_coefficient_beside_it_is_caught(change: float) -> None:
    merged = Similarity().eval()
    assert judged(Rounds(Similarity(change).weight), merged).status == "failed"


def test_a_device_holds_its_base_to_the_same() -> None:
    loaded = LoadedModel(source="", module=Similarity().eval(), kind="any", names={})
    known = device_reference.exact(loaded, {"x": torch.from_numpy(ones())})
    limits = device_reference.limits(loaded, known, "float32")

    def device(change: float = 0.0) -> None:
        outputs = Rounds(Similarity(change).weight).run(known.inputs)
        require_close(outputs, Golden(inputs=known.inputs, outputs=known.outputs), limits)

    device()
    with pytest.raises(ProofError, match="output logits is off"):
        device(1e-4)


def test_two_matrices_swapped_are_caught_where_norms_magnify() -> None:
    """A norm over nearly equal values magnifies rounding a thousandfold, and faults as well."""
    torch.manual_seed(0)
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    for layer in (first, second):
        nn.init.normal_(layer.weight, std=1e-3)
        nn.init.ones_(layer.bias)
    merged = nn.Sequential(first, nn.LayerNorm(8), second, nn.LayerNorm(8)).eval()
    swapped = nn.Sequential(second, nn.LayerNorm(8), first, nn.LayerNorm(8)).eval()
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    against = Reference(
        merged, swapped, outputs=["y"], cases=[Case(name="usual", batch={"input": x})]
    )

    def checked(module: nn.Module) -> str:
        runner = TorchRunner(module, ["y"], precision="float32", device="cpu")
        return judge(runner, against, artefact="file", precision="float32").status

    nudged = copy.deepcopy(merged)
    with torch.no_grad():
        nudged.get_parameter("0.weight")[1, 2] += 1e-5
    assert [checked(module) for module in (merged, swapped, nudged)] == [
        "passed",
        "failed",
        "failed",
    ]


def test_noise_leaves_whole_numbers_and_what_follows_them() -> None:
    """Masks, counts and positions are exact everywhere: `1 - mask` has no noise to magnify."""
    mask = torch.tensor([[1.0, 1.0, 0.0]])

    def masked() -> Tensor:
        visible = mask @ torch.eye(3)
        return (1 - visible) * torch.finfo(torch.float32).min + mask.sum(-1) + mask.mean() * 3

    before = masked()
    with RoundingNoise(2.0**-24, 0):
        assert torch.equal(masked(), before)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 3),
        nn.Conv1d(6, 3, 1),
        nn.LayerNorm(6),
        nn.MultiheadAttention(6, 2),
        nn.LSTM(6, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_noise_reaches_every_kind_of_product(layer: nn.Module) -> None:
    x = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = (x,) * 3 if isinstance(layer, nn.MultiheadAttention) else (x,)

    def run() -> Tensor:
        with torch.inference_mode():
            result = layer.double().eval()(*inputs)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    exact = run()
    with RoundingNoise(2.0**-24, 0):
        noisy = run()
    error = compare(noisy.numpy(), exact.numpy()).relative_l2
    assert 2.0**-26 < error < 2.0**-18


@pytest.mark.parametrize(("runs", "most"), [((1e-6, 1e-6, 1e-2), 4e-6), ((1.0, 1.0), 0.1)])
def test_the_second_largest_run_counts_and_never_more_than_a_tenth(
    runs: tuple[float, ...], most: float
) -> None:
    def off(e: float) -> Metrics:
        return compare(np.array([1.0, e]), np.array([1.0, 0.0]))

    tight = limit([], "float32")
    assert widened(tight, [off(e) for e in runs]).relative_l2 == pytest.approx(most)
    assert widened(tight, []) == tight
