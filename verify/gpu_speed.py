"""Part three of a GPU's proof: how fast it merges and trains, as ratios measured in one run.

Nothing here passes or fails: the numbers are for `benchmarks/results/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import sqrt
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from kilodelta.compress.packed import SignBases, SignMixer
from kilodelta.format.bases import Role, Stream
from kilodelta.format.coefficients import largest, storage
from kilodelta.format.methods import Method, Nola, RandLora
from kilodelta.format.targets import Target
from kilodelta.kernels.choose import unit_for
from kilodelta.kernels.sides import sides
from kilodelta.kernels.unit import Step
from kilodelta.verify.gpu_base import llama
from kilodelta.verify.gpu_part import Row, Setting

STREAM = Stream(0)
TURNS = 5


def speed(setting: Setting) -> Iterator[Row]:
    """The seven projections of a 7B Llama layer in bfloat16, and NOLA's training sums."""
    device = torch.device(setting.device)
    shapes = [
        shape for _, shape in llama(1, *((64, 176) if setting.small else (4096, 11008))).values()
    ]
    weights = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    copy = best(lambda: [weight + 1 for weight in weights], device)
    yield Row(what="read and write seven projections once", found=f"{copy * 1e3:.3f} ms")
    yield from _nola(weights, copy, device, small=setting.small)
    yield from _randlora(weights, device)
    yield _training(device, small=setting.small)


def best(run: Callable[[], object], device: torch.device) -> float:
    """The best of several turns in seconds, after one to warm up."""
    found = float("inf")
    for turn in range(TURNS + 1):
        began = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found = min(found, perf_counter() - began) if turn else found
    return found


def merging(method: Method, weights: list[Tensor], device: torch.device) -> Callable[[], object]:
    """Draw the factors and merge all weights, coefficients being on the device already."""
    rng, unit, jobs = np.random.default_rng(0), unit_for(device, method), []
    for weight in weights:
        shape = (weight.shape[0], weight.shape[1])
        target = Target(name="x", dtype="BF16", shape=shape, transposed=False, index=0)
        q = {
            group.name: rng.integers(-largest(8), largest(8) + 1, group.shape).astype(storage(8))
            for group in method.groups(target)
        }
        bound = method.bound(q)
        step = Step(c=1, e=-bound.bit_length(), bound=bound)
        jobs.append((weight, sides(method, q, target, STREAM, unit), step))
    return lambda: [
        unit.add(weight, found.out(range(weight.shape[0])), found.in_(range(weight.shape[1])), step)
        for weight, found, step in jobs
    ]


def _nola(
    weights: list[Tensor], copy: float, device: torch.device, *, small: bool
) -> Iterator[Row]:
    method = Nola(rank=8, bases=64 if small else 1024)
    ours = best(merging(method, weights, device), device)
    other = best(lambda: [official_nola(weight, method) for weight in weights], device)
    yield Row(
        what=f"NOLA r={method.rank} k={method.bases}",
        found=f"{ours / copy:.2f} x reading and writing, {other / ours:.1f} x the official way's "
        f"speed ({ours * 1e3:.3f} ms)",
    )


def official_nola(weight: Tensor, method: Nola) -> Tensor:
    """The paper's code in outline: bases drawn by torch from a seed, summed, multiplied, added."""
    k, device = method.bases, weight.device
    torch.manual_seed(0)
    factors = []
    for shape in ((weight.shape[0], method.rank), (method.rank, weight.shape[1])):
        bases = torch.rand(k, *shape, device=device) * 2 - 1
        coefficients = torch.randn(k, device=device)
        factors.append(torch.einsum("k,kij->ij", coefficients, bases) / sqrt(k))
    return weight + (factors[0] @ factors[1]).to(weight.dtype)


def _randlora(weights: list[Tensor], device: torch.device) -> Iterator[Row]:
    method = RandLora(rank=32)
    ours = best(merging(method, weights, device), device)
    other = best(lambda: [_float_product(weight, method.rank) for weight in weights], device)
    products = sum(2 * w.shape[0] * w.shape[1] * min(w.shape) for w in weights)
    yield Row(
        what=f"RandLoRA r={method.rank}",
        found=f"{products / ours / 1e12:.1f} int8 TOPS, {other / ours:.1f} x the speed of PEFT's "
        f"float32 product ({ours * 1e3:.3f} ms)",
    )


def _float_product(weight: Tensor, rank: int) -> Tensor:
    """PEFT's `get_delta_weight` in outline, its bases drawn already, in float32."""
    large, small = max(weight.shape), min(weight.shape)
    n = -(-small // rank)
    B = torch.ones(large, n * rank, device=weight.device)
    A = torch.ones(rank, 1, small, device=weight.device)
    lambda_ = torch.ones(rank, n, device=weight.device)
    gamma = torch.ones(n, small, device=weight.device)
    scaled = (A * lambda_[:, :, None] * gamma[None]).reshape(-1, small)
    return B @ scaled


def _training(device: torch.device, *, small: bool) -> Row:
    """NOLA's sums and their gradient for all targets of a GPT-2 medium, r = 8, k = 512."""
    layers, width = (1, 32) if small else (24, 1024)
    lines = [width, 3 * width, width, 4 * width] * layers
    bases = SignBases(STREAM, Role.NOLA_B, lines=max(lines), rank=8, bases=512, lines_are_rows=True)
    mixer = SignMixer(bases, lines, 8)
    coefficients = [torch.randn(512, device=device, requires_grad=True) for _ in lines]
    seconds = best(lambda: torch.autograd.grad(mixer.mix(coefficients).sum(), coefficients), device)
    memory = ""
    if device.type == "cuda":
        memory = f", {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB at the peak so far"
    return Row(
        what=f"NOLA's sums and gradient, {len(lines)} targets",
        found=f"{seconds * 1e3:.2f} ms a step for one factor{memory}",
    )
