"""Add an update and round, as the format says: y = float32(W) + 2^e float32(N), then to its type.

All to nearest even (docs/format.md, section 6). `2^e float32(N)` is exact, so a fused multiply-add
changes nothing. float16 and bfloat16 travel as uint16, converted by integer arithmetic, because
neither numpy nor numba knows both on every processor.
"""

from __future__ import annotations

import numpy as np

from kilodelta.exact.compiled import kernel

_1, _13, _16 = np.uint32(1), np.uint32(13), np.uint32(16)
_HALF_MIN = np.uint32(0x38800000)  # 2^-14, the smallest normal float16
_HALF_BIAS = np.uint32(0x38000000)  # 112 << 23: what float32's exponent has more than float16's
_MAGIC = np.float32(8388608.0)  # 2^23: adding it rounds to an integer, to nearest even
_MAGIC_BITS = np.uint32(0x4B000000)


@kernel
def _step(number, factor, scale):  # type: ignore[no-untyped-def]
    """Compute 2^e float32(C dQ); C dQ is exact in float64."""
    # BLAS may leave a zero as -0.0, which would keep a weight of -0.0 from becoming +0.0.
    return scale * np.float32(np.float64(number) * factor + 0.0)


@kernel
def add_f32(weights, numbers, factor, scale, out):  # type: ignore[no-untyped-def]
    """Merge float32 (n,) into `out`; return whether anything in it is not finite.

    Args:
        weights: float32 (n,).
        numbers: dQ, integers of any type that holds them, (n,).
        factor: C, float64.
        scale: 2^e, float32.
        out: float32 (n,).
    """
    bad = np.uint32(0)
    for j in range(out.size):
        y = np.float32(weights[j] + _step(numbers[j], factor, scale))
        out[j] = y
        bits = np.uint32(np.float32(y).view(np.uint32) & np.uint32(0x7F800000))
        bad |= np.uint32(bits == np.uint32(0x7F800000))
    return bad


@kernel
def add_bf16(weights, numbers, factor, scale, out):  # type: ignore[no-untyped-def]
    """Do what `add_f32` does, for bfloat16 as uint16.

    Args:
        weights: bfloat16 bits, uint16 (n,).
        numbers: dQ, integers of any type that holds them, (n,).
        factor: C, float64.
        scale: 2^e, float32.
        out: uint16 (n,).
    """
    bad = np.uint32(0)
    for j in range(out.size):
        w = np.uint32(np.uint32(weights[j]) << _16).view(np.float32)
        bits = np.float32(w + _step(numbers[j], factor, scale)).view(np.uint32)
        # Test for NaN before rounding as well: adding the bias to an all-ones payload wraps around
        # to zero.
        bad |= np.uint32(np.uint32(bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000))
        odd = np.uint32(np.uint32(bits >> _16) & _1)
        bits = np.uint32(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> _16)
        out[j] = np.uint16(bits)
        bad |= np.uint32(np.uint32(bits & np.uint32(0x7F80)) == np.uint32(0x7F80))
    return bad


@kernel
def from_half(half):  # type: ignore[no-untyped-def]
    """Widen float16 bits to float32; infinity and NaN come out as infinity."""
    # Subnormal float16 are multiples of 2^-24, which float32 holds as normal numbers.
    magnitude = np.uint32(half & np.uint32(0x7FFF))
    normal = np.uint32(np.uint32(magnitude << _13) + _HALF_BIAS).view(np.float32)
    small = np.float32(np.float32(magnitude) * np.float32(2.0**-24))
    value = small if magnitude < np.uint32(0x400) else normal
    value = value if magnitude < np.uint32(0x7C00) else np.float32(np.inf)
    return -value if half & np.uint32(0x8000) else value


@kernel
def to_half(value):  # type: ignore[no-untyped-def]
    """Round float32 to float16 bits, to nearest even, subnormals kept."""
    bits = np.uint32(np.float32(value).view(np.uint32))
    sign = np.uint32(np.uint32(bits >> _16) & np.uint32(0x8000))
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(size >> _13) & _1)
    round_ = np.uint32(np.uint32(0xFFF) + odd)
    normal = np.uint32(np.uint32(np.uint32(size - _HALF_BIAS) + round_) >> _13)
    units = np.float32(np.uint32(size).view(np.float32) * np.float32(2.0**24))
    small = np.uint32(np.float32(units + _MAGIC).view(np.uint32) - _MAGIC_BITS)
    # Subnormals: in units of 2^-24, adding 2^23 leaves the rounded count in the low mantissa bits.
    half = small if size < _HALF_MIN else min(normal, np.uint32(0x7C00))
    return np.uint32(half | sign)


@kernel
def narrow_f16(values, out):  # type: ignore[no-untyped-def]
    """Round float32 (n,) to float16 bits, uint16 (n,), to nearest even.

    Returns:
        whether some result is not finite; `out` is of no use then, for a NaN has become infinity.
    """
    bad = np.uint32(0)
    for j in range(out.size):
        bits = to_half(values[j])
        out[j] = np.uint16(bits)
        bad |= np.uint32(np.uint32(bits & np.uint32(0x7C00)) == np.uint32(0x7C00))
    return bad


@kernel
def add_f16(weights, numbers, factor, scale, out):  # type: ignore[no-untyped-def]
    """Do what `add_f32` does, for float16 as uint16.

    Args:
        weights: float16 bits, uint16 (n,).
        numbers: dQ, integers of any type that holds them, (n,).
        factor: C, float64.
        scale: 2^e, float32.
        out: uint16 (n,).
    """
    bad = np.uint32(0)
    for j in range(out.size):
        w = from_half(np.uint32(weights[j]))
        bits = to_half(np.float32(w + _step(numbers[j], factor, scale)))
        out[j] = np.uint16(bits)
        bad |= np.uint32(np.uint32(bits & np.uint32(0x7C00)) == np.uint32(0x7C00))
    return bad


@kernel
def widen_f16(bits, out):  # type: ignore[no-untyped-def]
    """Compute float64 values of float16: uint16 (n,) to float64 (n,)."""
    for j in range(bits.size):
        half = np.uint32(bits[j])
        is_nan = np.uint32(half & np.uint32(0x7FFF)) > np.uint32(0x7C00)
        out[j] = np.nan if is_nan else np.float64(from_half(half))


ADD = {"F32": (np.float32, add_f32), "F16": (np.uint16, add_f16), "BF16": (np.uint16, add_bf16)}
"""By safetensors dtype: how the raw weights are viewed, and the kernel."""
