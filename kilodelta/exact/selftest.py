"""Prove a machine's kernels on typed-in values before it merges anything.

docs/format.md, section 7. A processor that flushes subnormal numbers to zero, a miscompiled kernel
or a saturating int8 product is refused here. Kernels are loaded by the checks, so that commands
which decode nothing do not wait for numba.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from kilodelta.errors import SelfTestError
from kilodelta.exact import products
from kilodelta.exact.bases import Ints, Stream
from kilodelta.files.dtypes import FLOATS
from kilodelta.memory import uncollected

KNOWN_ANSWERS = (
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
"""Counter, key and words from Random123's kat_vectors, philox4x32 10."""


@lru_cache(maxsize=1)
def require_good_kernels() -> None:
    """Run every kernel on known values, once per process.

    Raises:
        SelfTestError: a result differs.
    """
    for name, passes in _CHECKS.items():
        with uncollected():  # kernels are loaded
            is_right = passes()
        if not is_right:
            raise SelfTestError(
                f"this machine's {name} does not reproduce the golden values",
                fix="merge on another machine, and report this processor and its numba version",
            )


def _philox_is_right() -> bool:
    from kilodelta.exact import philox

    for counter, key, expected in KNOWN_ANSWERS:
        row, column, block, role = (np.uint32(word) for word in counter)
        out = np.empty((1, 1, 1, 4), np.uint32)
        philox.draw(np.uint32(key[0]), np.uint32(key[1]), role, row, column, block, out)
        if tuple(map(int, out.ravel())) != expected:
            return False
    return True


def _bases_are_right() -> bool:
    stream, rows, columns = Stream(0x0123456789ABCDEF), range(3, 8), range(250, 520)
    q = ((np.arange(300) * 37) % 255 - 127).astype(np.int16)
    one = np.ones((9, 520), np.int8)
    drawn = (
        stream.mix(0, q, rows, columns),
        stream.signs(3, one, rows, columns).astype(np.int64),
        stream.ternary(2, 3, one, rows, columns).astype(np.int64),
        stream.pick(7, 7, q, rows, columns).astype(np.int64),
    )
    state = hashlib.sha256()
    for part in drawn:
        state.update(np.ascontiguousarray(part, dtype="<i8").data)
    return state.hexdigest() == BASES_DIGEST


BASES_DIGEST = "6fbbebf587ccf7caf1f4d3a4c93d0eace00d2a51ecc2514dbd1871cc76d529b4"
"""Computed by `kilodelta.exact.reference`, which shares no code with the kernels."""


def _products_are_right() -> bool:
    """Check the products that need no torch; torch's is tested where it is chosen."""
    rng = np.random.default_rng(1)
    left = rng.integers(-(2**20), 2**20, (5, 47))
    right = rng.integers(-(2**20), 2**20, (47, 530))
    wide = np.array_equal(products.product(left, right, 2**46), left @ right)
    return wide and products.passes_self_test(products.by_float32) and _fused_is_right(left, right)


def _fused_is_right(left: Ints, right: Ints) -> bool:
    from kilodelta.exact import fused

    weights, out = np.zeros((5, 530), np.float32), np.empty((5, 530), np.float32)
    few, most = left[:, :7].astype(np.float64), right[:7].astype(np.float64)
    fused.merge_f32(few, most, weights, np.float64(3), np.float32(2.0**-9), out)
    exact_sum = 3 * (left[:, :7] @ right[:7])
    return np.array_equal(out, exact_sum.astype(np.float32) * np.float32(2.0**-9))


def _ordered_sums_are_right() -> bool:
    from kilodelta.exact import ordered

    left = (((np.arange(3 * 150) * 37) % 255 - 127) / 7).astype(np.float32).reshape(3, 150)
    right = (((np.arange(150 * 270) * 91) % 1021 - 510) / 11).astype(np.float32).reshape(150, 270)
    product = ordered.multiplier(right)(left)
    return hashlib.sha256(product.astype("<f8").data).hexdigest() == ORDERED_DIGEST


ORDERED_DIGEST = "660936de09417d05030e87043bcf0ac4e20d296e378f7a137f37d88369bbda68"
"""Computed by plain loops over Python floats, in tests/exact/test_ordered.py."""


ROUNDED = {
    # a tie to even, a tie to odd, a carry into the exponent, a subnormal kept, -0 + 0 = +0
    "F32": ((0x3F800000, 0x3F800001, 0x3F7FFFFF, 0x00000001, 0x80000000), np.uint32),
    "BF16": ((0x3F80, 0x3F81, 0x3F7F, 0x0001, 0x8000), np.uint16),
    "F16": ((0x3C00, 0x3C01, 0x3BFF, 0x0001, 0x8000), np.uint16),
}
"""Weights to which half a unit in the last place of 1 is added, and to the last two zero."""


def _rounding_is_right() -> bool:
    return all(_rounds(dtype) for dtype in ROUNDED)


def _rounds(dtype: str) -> bool:
    from kilodelta.exact import rounding

    bits, width = ROUNDED[dtype]
    view, add = rounding.ADD[dtype]
    weights = np.array(bits, width).view(view)
    out = np.empty_like(weights)
    numbers = np.array([1, 1, 1, 0, 0], np.float64)
    add(weights, numbers, np.float64(1), np.float32(FLOATS[dtype].unit_roundoff), out)
    expected = (bits[0], bits[1] + 1, bits[0], bits[3], 0)
    return tuple(map(int, out.view(width))) == expected


_CHECKS = {
    "Philox": _philox_is_right,
    "basis kernels": _bases_are_right,
    "integer products": _products_are_right,
    "ordered sum": _ordered_sums_are_right,
    "rounding": _rounding_is_right,
}
