"""Make the values that builds are recognised by: a twin's, and those of one further fine-tune.

A weight of an engine is a tensor of floats, or of a quantised base a matrix of codes (`codes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from kilodelta.export.patching.engine.codes import moved_codes, packed, random_codes
from kilodelta.export.patching.locate import RUN, fewest_bytes
from kilodelta.files.dtypes import FLOATS, TARGETS
from kilodelta.files.floats import cast
from kilodelta.files.tensor import RawTensor
from kilodelta.grid.matrix import Matrix

Value: TypeAlias = RawTensor | Matrix
"""What a weight of an engine is: floats, or codes with their steps."""


def unsearchable(tensor: Value) -> str:
    """Say why a weight cannot be looked for; empty if it can."""
    if isinstance(tensor, Matrix):
        few = packed(tensor, transposed=False).size < RUN
        return "it has too few codes to be told from others" if few else ""
    if tensor.dtype not in TARGETS:
        return f"it is {tensor.dtype}, and weights of the network are floats"
    if fewest_bytes(tensor) < RUN:
        return "it has too few numbers to be told from others"
    elements = tensor.data.view(FLOATS[tensor.dtype].storage)
    if (elements == elements[0]).all():
        return "all its values are equal, and TensorRT may have simplified them away"
    return ""


def twin_of(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Make weights of the same types and shapes whose values no two of them share."""
    return {n: _unlike_any_other(t, seed) for seed, (n, t) in enumerate(tensors.items())}


def _unlike_any_other(tensor: Value, seed: int) -> Value:
    """Make random codes, or positive values from 2^-8 to 1 that F32, F16 and BF16 hold exactly."""
    if isinstance(tensor, Matrix):
        return random_codes(tensor, seed)
    random = np.random.default_rng([2026, seed])
    count = int(np.prod(tensor.shape))
    mantissa = 1 + random.integers(128, size=count) / 128
    values = np.ldexp(mantissa, random.integers(-8, 0, size=count)).astype(np.float32)
    data = cast(values.view(np.uint8), "F32", tensor.dtype)
    return RawTensor(dtype=tensor.dtype, shape=tensor.shape, data=data)


def perturbed(tensor: Value, seed: int) -> Value:
    """Make a fine-tune's values: the base's codes moved, or its floats with noise in every bit."""
    if isinstance(tensor, Matrix):
        return moved_codes(tensor, seed)
    random = np.random.default_rng([1128, seed])
    values = FLOATS[tensor.dtype].widen(tensor.data).astype(np.float32)
    noise = random.normal(scale=max(1e-3, 0.05 * float(np.std(values))), size=values.shape)
    changed = (values + noise).astype(np.float32)
    data = cast(changed.view(np.uint8), "F32", tensor.dtype)
    return RawTensor(dtype=tensor.dtype, shape=tensor.shape, data=data)
