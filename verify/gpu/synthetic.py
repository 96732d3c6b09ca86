"""Make bases of random weights and deltas of random coefficients, for proofs on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from kilodelta.files.dtypes import FLOATS, TARGETS
from kilodelta.files.safetensors import write_stream
from kilodelta.files.tensor import TensorInfo
from kilodelta.format.delta import Delta
from kilodelta.format.methods import METHODS as REGISTERED
from kilodelta.format.methods import Lora, Method, Nola, RandLora, UniLora, Vera
from kilodelta.format.quantise import quantise
from kilodelta.format.targets import Patterns
from kilodelta.merging import build

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]

METHODS: tuple[Method, ...] = (
    Nola(rank=8, bases=300),
    RandLora(rank=16),
    RandLora(rank=16, basis="ternary", sparsity=3),
    Lora(rank=4),
    Vera(rank=20),
    UniLora(rank=4, bases=500, anchor=9),
)
"""Larger than the self-test's samples, so that every kernel runs on several tiles."""


def methods() -> Iterator[Method]:
    """Yield the methods to prove: those above, and the samples of every other one."""
    yield from METHODS
    listed = {method.name for method in METHODS}
    for name, kind in REGISTERED.items():
        yield from () if name in listed else kind.samples()


SMALL: Shapes = {
    f"{kind}.{dtype}.weight": (dtype, shape)
    for dtype in sorted(TARGETS)
    for kind, shape in {
        "tall": (333, 130),
        "wide": (129, 515),
        "conv": (24, 5, 3, 3),
        "turned": (96, 200),
    }.items()
}
"""Every dtype, sizes that do not divide, a convolution, and tensors stored (in, out)."""

PATTERNS = Patterns(include=("*.weight",), exclude=(), transposed=("turned.*",))


def llama(layers: int, width: int, hidden: int) -> Shapes:
    """Return the seven projections of so many Llama layers, bfloat16, without grouped heads."""
    square, up, down = (width, width), (hidden, width), (width, hidden)
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), square)
    shapes |= {"gate_proj": up, "up_proj": up, "down_proj": down}
    return {
        f"layers.{layer:02}.{name}.weight": ("BF16", shape)
        for layer in range(layers)
        for name, shape in shapes.items()
    }


def write(path: Path, shapes: Shapes, seed: int = 0) -> Path:
    """Write a `.safetensors` file of normal numbers, tensor by tensor."""
    rng = np.random.default_rng(seed)
    order = [TensorInfo(name=n, dtype=dtype, shape=shape) for n, (dtype, shape) in shapes.items()]

    def data(info: TensorInfo) -> bytes:
        values = rng.standard_normal(info.shape, np.float32) * np.float32(0.05)
        return bytes(FLOATS[info.dtype].narrow(values).tobytes())

    write_stream(path, order, map(data, order), {"format": "pt"})
    return path


def delta(
    base: Path, method: Method, patterns: Patterns = PATTERNS, bits: int = 8, fine_tune: int = 1
) -> Delta:
    """Make a delta whose updates are about as large as the weights, its digest computed on the CPU.

    Args:
        base: a `.safetensors` file.
        method: with its options.
        patterns: which tensors it changes.
        bits: per coefficient.
        fine_tune: the seed of the coefficients.
    """
    rng = np.random.default_rng(fine_tune)
    shared = {
        group.name: quantise(rng.normal(size=group.shape), bits, 15) for group in method.shared()
    }
    own = {
        target.name: build.quantise_target(
            method,
            {
                group.name: rng.normal(size=group.shape) * 0.02 if group.size else 0.001
                for group in method.groups(target)
            },
            bits,
            shared,
        )
        for target in build.targets(base, patterns)
    }
    recipe = build.Recipe(method=method, patterns=patterns, seed=2**63 + 5, bits=bits)
    return build.build(base, recipe, own, shared)
