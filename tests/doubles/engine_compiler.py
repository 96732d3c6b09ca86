"""A double of an engine's compiler: weights among other bytes, in the layouts that TensorRT uses.

What it does to each tensor of `base()` is in the tensor's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilodelta.files.dtypes import FLOATS
from kilodelta.files.floats import cast

Values = NDArray[np.float32]
SHAPES: Mapping[str, tuple[int, ...]] = {
    "plain": (6, 8),
    "turned": (6, 8),
    "joined.q": (5, 8),
    "joined.k": (5, 8),
    "split": (4, 12),
    "bias": (12,),
    "widened": (8,),
    "twice": (7, 8),
    "folded": (6, 8),
    "quantised": (6, 8),
    "stated": (8,),
    "short": (2,),
    "ones": (8,),
}


def values(seed: int = 0) -> dict[str, Values]:
    """Weights of the base, or of another model of its architecture."""
    random = np.random.default_rng(seed)
    made = {n: random.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    return made | {"ones": np.ones(SHAPES["ones"], np.float32)}


def engine(held: Mapping[str, Values], dtype: str, number: int = 7) -> bytes:
    """Compile weights of one precision; `number` is that of an internal value in this build."""

    def raw(array: Values, kind: str = dtype) -> bytes:
        data = np.ascontiguousarray(array, np.float32).reshape(-1).view(np.uint8)
        narrow = cast(data, "F32", dtype)
        return bytes(cast(narrow, dtype, kind) if kind != dtype else narrow)

    stated = FLOATS[dtype].rounded(held["stated"])
    text = ", ".join(f"{value:g}" for value in stated[:8])
    quantised = np.clip(np.round(held["quantised"] * 20), -127, 127).astype(np.int8)
    split = [held["split"][:, begin : begin + 4] for begin in (8, 4, 0)]
    return b"|".join(
        [
            f"engine of __mye{number}, constant-{{{text}, ...}}".encode(),
            raw(held["plain"]),
            raw(held["turned"].T),
            raw(np.hstack([held["joined.k"].T, held["joined.q"].T])),
            *(raw(part) for part in split),
            raw(held["bias"]),
            raw(held["widened"], "F32"),
            raw(held["twice"]),
            raw(held["twice"].T),
            raw(held["folded"] * held["quantised"]),
            quantised.tobytes(),
            raw(held["stated"]),
            raw(held["short"]),
            raw(held["ones"]),
        ]
    )


class Compiler:
    """Builds engines of `base`, and counts them; of every three builds one is numbered oddly.

    Args:
        base: its weights.
        dtype: the precision.
        spoil: changes an engine's bytes, given all weights and the number of builds before.
    """

    def __init__(
        self,
        base: Mapping[str, Values],
        dtype: str,
        spoil: Callable[[bytes, Mapping[str, Values], int], bytes] | None = None,
    ) -> None:
        self._base, self._dtype, self._spoil, self.builds = base, dtype, spoil, 0

    def __call__(self, changed: Mapping[str, Any], out: Path) -> None:
        held = {
            name: FLOATS[changed[name].dtype].widen(changed[name].data).reshape(array.shape)
            if name in changed
            else array
            for name, array in self._base.items()
        }
        data = engine(held, self._dtype, 7 if self.builds % 3 else 8)
        out.write_bytes(self._spoil(data, held, self.builds) if self._spoil else data)
        self.builds += 1
