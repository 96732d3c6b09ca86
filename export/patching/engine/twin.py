"""Make the values that builds are recognised by: a twin's, and those of one further fine-tune."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kilodelta.export.patching.locate import RUN, fewest_bytes
from kilodelta.files.dtypes import FLOATS, TARGETS
from kilodelta.files.floats import cast
from kilodelta.files.tensor import RawTensor


def unsearchable(tensor: RawTensor) -> str:
    """Say why a tensor cannot be looked for; empty if it can."""
    if tensor.dtype not in TARGETS:
        return f"it is {tensor.dtype}, and weights of the network are floats"
    if fewest_bytes(tensor) < RUN:
        return "it has too few numbers to be told from others"
    elements = tensor.data.view(FLOATS[tensor.dtype].storage)
    if (elements == elements[0]).all():
        return "all its values are equal, and TensorRT may have simplified them away"
    return ""


def twin_of(tensors: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Make tensors of the same types and shapes whose values no two of them share."""
    return {n: _unlike_any_other(t, seed) for seed, (n, t) in enumerate(tensors.items())}


def _unlike_any_other(tensor: RawTensor, seed: int) -> RawTensor:
    """Make random positive values between 2^-8 and 1 that F32, F16 and BF16 all hold exactly."""
    random = np.random.default_rng([2026, seed])
    count = int(np.prod(tensor.shape))
    mantissa = 1 + random.integers(128, size=count) / 128
    values = np.ldexp(mantissa, random.integers(-8, 0, size=count)).astype(np.float32)
    data = cast(values.view(np.uint8), "F32", tensor.dtype)
    return RawTensor(dtype=tensor.dtype, shape=tensor.shape, data=data)


def perturbed(tensor: RawTensor, seed: int) -> RawTensor:
    """Make a fine-tune's values: the base's with noise in every bit of the mantissa."""
    random = np.random.default_rng([1128, seed])
    values = FLOATS[tensor.dtype].widen(tensor.data).astype(np.float32)
    noise = random.normal(scale=max(1e-3, 0.05 * float(np.std(values))), size=values.shape)
    changed = (values + noise).astype(np.float32)
    data = cast(changed.view(np.uint8), "F32", tensor.dtype)
    return RawTensor(dtype=tensor.dtype, shape=tensor.shape, data=data)
