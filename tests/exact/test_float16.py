"""Scales in float16, widened."""

from __future__ import annotations

import numpy as np

from kilodelta.exact.rounding import widen_f16


def test_every_float16_is_widened_as_numpy_does() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(bits.size)
    widen_f16(bits, wide)
    numpys = bits.view(np.float16).astype(np.float64)
    numbers = ~np.isnan(numpys)
    # -0.0, subnormal numbers and infinity too
    assert np.array_equal(wide[numbers].view(np.uint64), numpys[numbers].view(np.uint64))
    assert np.isnan(wide[~numbers]).all()
    assert wide[0x3C01] == 1 + 2**-10
    assert wide[0x8001] == -(2.0**-24)
