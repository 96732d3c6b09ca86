"""Draw PyTorch's random numbers on a CPU, bit for bit, without PyTorch.

Its generator is MT19937 (Matsumoto and Nishimura, 1998) seeded by the low 32 bits; a uniform number
takes one 32-bit output and keeps its low 24 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.files.dtypes import FLOATS

Floats = npt.NDArray[Any]


class TorchCpu:
    """`torch.Generator("cpu").manual_seed(seed)`."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)

    def _units(self, count: int) -> Floats:
        """Draw multiples of 2^-24 in [0, 1), float64 (count,)."""
        words = self._state.randint(0, 1 << 32, size=count, dtype=np.uint32)
        units: Floats = (words & np.uint32(0xFFFFFF)) * 2.0**-24
        return units

    def rand(self, shape: tuple[int, ...]) -> Floats:
        """Draw what `torch.rand` draws, float32."""
        return self._units(int(np.prod(shape))).astype(np.float32).reshape(shape)

    def uniform(self, shape: tuple[int, ...], bound: float, dtype: str) -> Floats:
        """Draw what `tensor.uniform_(-bound, bound)` draws in a type, as float32.

        Args:
            shape: of the tensor.
            bound: of the magnitudes.
            dtype: the tensor's, by its safetensors name.
        """
        low, high = np.float32(-bound), np.float32(bound)
        units = self._units(int(np.prod(shape)))
        wide = (units * np.float64(high - low) + np.float64(low)).astype(np.float32)
        drawn = FLOATS[dtype].rounded(wide)
        top = FLOATS[dtype].rounded(np.array([high]))[0]
        return np.where(drawn == top, -drawn, drawn).reshape(shape)
