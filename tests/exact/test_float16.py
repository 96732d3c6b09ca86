"""Scales in float16, widened."""

from __future__ import annotations

import numpy as np

from kilodelta.exact.float16 import widen


def test_every_float16_is_widened_as_numpy_does() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(bits.size, np.uint64)
    widen(bits, wide)
    numpys = bits.view(np.float16).astype(np.float64)
    numbers = ~np.isnan(numpys)
    assert np.array_equal(wide[numbers], numpys.view(np.uint64)[numbers])  # -0.0 and infinity too
    assert np.isnan(wide.view(np.float64)[~numbers]).all()
    assert wide[0x3C01] == 0x3FF0040000000000  # 1 + 2^-10
    assert wide[0x8001] == 0xBE70000000000000  # -2^-24, the smallest
