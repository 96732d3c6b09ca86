"""Part three of a GPU's proof: how fast it merges and trains, as ratios measured in one run.

Nothing here passes or fails: rows are `measured`, and say whether a ratio is as wanted of a
data-centre GPU. `benchmarks/gpu.py` prints the same measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn

from kilodelta.errors import require
from kilodelta.exact.bases import Stream
from kilodelta.format.methods import Method, Nola, RandLora
from kilodelta.format.packing import largest, storage
from kilodelta.format.targets import Target
from kilodelta.merging.gpu.choose import device_named, unit_for
from kilodelta.merging.gpu.sides import sides
from kilodelta.merging.gpu.unit import UpdateScale
from kilodelta.verify.gpu.measure import Measure, Run, Threshold, captured, side_by_side
from kilodelta.verify.gpu.part import PartRow, Setting, guarded
from kilodelta.verify.gpu.synthetic import llama
from kilodelta.verify.gpu.training import training

STREAM = Stream(0)


def speed(setting: Setting) -> Iterator[PartRow]:
    """Yield all measurements as rows; those that cannot be taken say why."""
    for measure in measures(setting):
        yield measure.row() if isinstance(measure, Measure) else measure


def measures(setting: Setting) -> Iterator[Measure | PartRow]:
    """Measure merges of the seven projections of a 7B Llama layer, and a training step."""
    device, small = device_named(setting.device), setting.small
    sizes = (64, 176) if small else (4096, 11008)
    shapes = [shape for _, shape in llama(1, *sizes).values()]
    weights = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    nola = Nola(rank=8, bases=64 if small else 1024)
    randlora = RandLora(rank=32)
    yield from guarded("NOLA", against_copying(nola, weights, device))
    yield from guarded("NOLA, the official way", against_official(nola, weights, device))
    yield from guarded("RandLoRA", against_int8(randlora, weights, device, 64 if small else 8192))
    yield from guarded("RandLoRA, PEFT", against_peft(randlora, weights, device))
    del weights
    yield from guarded("training step", training(device, small=small))


def against_copying(method: Nola, weights: list[Tensor], device: torch.device) -> Iterator[Measure]:
    """Compare NOLA with what any merge must do: read and write the weights once."""
    copying = "reading and writing the weights once"
    runs = {"ours": merging(method, weights, device), "theirs": lambda: [w + 1 for w in weights]}
    what, wanted = _what(method, weights), Threshold(sense="<=", bound=2)
    yield _measure(what, copying, runs, device, wanted)
    graphs = {name: captured(run, device) for name, run in runs.items()}
    yield _measure(f"{what}, as CUDA graphs", copying, graphs, device, wanted)


def against_official(
    method: Nola, weights: list[Tensor], device: torch.device
) -> Iterator[Measure]:
    """Compare NOLA with the authors' way."""
    runs = {
        "ours": merging(method, weights, device),
        "theirs": lambda: [official_nola(weight, method) for weight in weights],
    }
    wanted = Threshold(sense=">=", bound=8)
    yield _measure(_what(method, weights), "official NOLA's way", runs, device, wanted)


def against_int8(
    method: RandLora, weights: list[Tensor], device: torch.device, size: int
) -> Iterator[Measure]:
    """Compare RandLoRA with as many operations at the rate of a large int8 product.

    Args:
        method: RandLoRA with its rank.
        weights: bfloat16 matrices (out, in).
        device: where they lie.
        size: of the square int8 product.
    """
    ours = merging(method, weights, device)
    left = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
    right = left.t()  # columns in a row, as cuBLAS's int8 products want them
    runs = {"ours": ours, "theirs": lambda: torch._int_mm(left, right)}
    work = sum(w.shape[0] * w.shape[1] * min(w.shape) for w in weights) / size**3
    rate, wanted = f"torch._int_mm's int8 rate at {size}^3", Threshold(sense=">=", bound=0.4)
    yield _measure(_what(method, weights), rate, runs, device, wanted, work)
    graphs = {"ours": captured(ours, device), "theirs": runs["theirs"]}
    what = f"{_what(method, weights)}, as a CUDA graph"
    yield _measure(what, rate, graphs, device, wanted, work)


def against_peft(
    method: RandLora, weights: list[Tensor], device: torch.device
) -> Iterator[Measure]:
    """Compare RandLoRA (drawn, multiplied, added) with PEFT's product alone, its bases ready."""
    theirs = peft_deltas(method.rank, [w.shape for w in weights], device)
    runs = {"ours": merging(method, weights, device), "theirs": theirs}
    wanted = Threshold(sense=">=", bound=8)
    against = "PEFT get_delta_weight in float32"
    yield _measure(_what(method, weights), against, runs, device, wanted)


def _measure(
    what: str, against: str, runs: dict[str, Run], device: torch.device, wanted: Threshold,
    work: float = 1.0,
) -> Measure:  # fmt: skip
    """Time both alternately; the other's time is scaled by `work`, our work over what it did."""
    measure = side_by_side(runs, device)
    theirs = measure["theirs"] * work
    return Measure(what=what, against=against, ours=measure["ours"], theirs=theirs, wanted=wanted)


def _what(method: Nola | RandLora, weights: list[Tensor]) -> str:
    size = max(max(weight.shape) for weight in weights)
    name = (
        f"NOLA r={method.rank} k={method.bases}"
        if isinstance(method, Nola)
        else (f"RandLoRA r={method.rank}")
    )
    return f"{name}, {len(weights)} projections of {min(weights[0].shape)} and {size}, bfloat16"


def merging(method: Method, weights: list[Tensor], device: torch.device) -> Run:
    """Return a run that draws the factors and merges all weights."""
    rng, unit, jobs = np.random.default_rng(0), unit_for(device, method), []
    for weight in weights:
        shape = (weight.shape[0], weight.shape[1])
        target = Target(name="x", dtype="BF16", shape=shape, transposed=False, index=0)
        q = {
            group.name: rng.integers(-largest(8), largest(8) + 1, group.shape).astype(storage(8))
            for group in method.groups(target)
        }
        bound = method.bound(q)
        step = UpdateScale(c=1, e=-bound.bit_length(), bound=bound)
        jobs.append((weight, sides(method, q, target, STREAM, unit), step))
    return lambda: [
        unit.add(weight, found.out(range(weight.shape[0])), found.in_(range(weight.shape[1])), step)
        for weight, found, step in jobs
    ]


def official_nola(weight: Tensor, method: Nola) -> Tensor:
    """Follow the authors' code: draw bases by torch from a seed, sum, multiply and add."""
    k, device = method.bases, weight.device
    torch.manual_seed(0)
    factors = []
    for shape in ((weight.shape[0], method.rank), (method.rank, weight.shape[1])):
        bases = torch.empty(k, *shape, device=device).uniform_(-1, 1)
        coefficients = torch.randn(k, device=device)
        factors.append(torch.einsum("k,kij->ij", coefficients, bases) / sqrt(k))
    return weight + (factors[0] @ factors[1]).to(weight.dtype)


def peft_deltas(rank: int, shapes: list[torch.Size], device: torch.device) -> Run:
    """Return a run of PEFT's `get_delta_weight` on PEFT's layers of these shapes (out, in).

    Its bases are drawn before and its results come from torch's warmed-up allocator. Scaling the
    bases, the product and the scale are in the time, as for every caller.

    Raises:
        MissingPackageError: PEFT is not installed.
    """
    library = require("peft", extra="peft", why="measure PEFT beside kilodelta")
    layers = nn.ModuleDict(
        {
            f"layer{index}": nn.Linear(columns, rows, bias=False, device=device)
            for index, (rows, columns) in enumerate(shapes)
        }
    )
    config = library.RandLoraConfig(r=rank, target_modules=list(layers), randlora_alpha=1)
    wrapped = library.get_peft_model(layers, config).to(device).float()
    layers_ = [wrapped.base_model.model[name] for name in layers]

    def run() -> None:
        with torch.no_grad():
            for layer in layers_:
                layer.get_delta_weight("default")

    return run
