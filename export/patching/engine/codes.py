"""Find the codes of quantised weights in an engine's bytes, and make codes to look for.

TensorRT-RTX 1.7 keeps INT4, INT8, FP8 and NVFP4 codes as one stream, of (out, in) or of (in, out).
Which of the two differs from weight to weight, so both are looked for. A merge in the grid changes
no scale: those are read from wherever the base's engine holds their bytes, or lie beside it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.export.patching.codes.places import CodePlaces
from kilodelta.export.patching.codes.streams import rest_place, streams
from kilodelta.export.patching.locate import RUN, occurrences
from kilodelta.export.patching.map import FilePlace
from kilodelta.files.tensor import Bytes
from kilodelta.grid.codes import NOT_A_NUMBER, Kind
from kilodelta.grid.layouts import Parts
from kilodelta.grid.layouts.base import float_values
from kilodelta.grid.matrix import Matrix


def packed(matrix: Matrix, *, transposed: bool) -> Bytes:
    """Pack a weight's codes as an engine holds them, uint8 `(n,)`.

    Args:
        matrix: the weight, (out, in).
        transposed: pack them as (in, out).
    """
    layout, parts = streams(matrix, "float32", transposed=transposed)
    return parts[layout.codes_in].data


def find_codes(held: bytes, name: str, matrix: Matrix, file: str) -> tuple[FilePlace, ...]:
    """Find all places of a weight's codes in an engine's bytes.

    Args:
        held: the engine's bytes.
        name: the weight's, which the places get.
        matrix: the weight; its codes should be random ones.
        file: the engine's name, which the places get.

    Example:
        >>> from kilodelta.grid.codes import integer_kind
        >>> codes = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
        >>> steps = np.ones((2, 1))
        >>> weight = Matrix(kind=integer_kind(4), codes=codes, steps=steps, block=(1, 8))
        >>> data = b"head" + packed(weight, transposed=True).tobytes()
        >>> [one] = find_codes(data, "w", weight, "m.engine")
        >>> one.begin, one.nbytes, one.transposed
        (4, 8, True)
    """
    places = []
    for transposed in (False, True) if min(matrix.shape) > 1 else (False,):
        layout, parts = streams(matrix, "float32", transposed=transposed)
        own = parts[layout.codes_in]
        places += [
            FilePlace(
                name=name,
                dtype=own.dtype,
                shape=own.shape,
                file=file,
                begin=begin,
                transposed=transposed,
                top=False,
            )
            for begin in occurrences(held, own.data.tobytes())
        ]
    return tuple(places)


def code_places(held: bytes, matrix: Matrix, place: FilePlace, dtype: str) -> CodePlaces:
    """Describe a copy of a weight, of which the place of the codes is known.

    Args:
        held: the base's engine.
        matrix: the base's weight.
        place: of its codes, from `find_codes`.
        dtype: what the network computes in, such as "float16".
    """
    turned = place.transposed
    layout, parts = streams(matrix, dtype, transposed=turned)
    scales = parts["x_scale"]
    exact = streams(matrix, "float32", transposed=turned)[1]
    where = {
        role: rest_place(place.name, role, part, transposed=turned)
        for role, part in exact.items()
        if role != layout.codes_in
    }
    # A few bytes stand somewhere by chance, and would read as if they meant something there.
    begin = held.find(scales.data.tobytes()) if scales.nbytes >= RUN else -1
    if begin >= 0 and _share_factor(parts, exact):
        where["x_scale"] = replace(
            where["x_scale"], dtype=scales.dtype, shape=scales.shape, file=place.file, begin=begin
        )
    own = replace(place, transposed=False)  # the layout says so
    return CodePlaces(layout=layout, block=matrix.block, parts={layout.codes_in: own, **where})


def _share_factor(parts: Parts, exact: Parts) -> bool:
    """Return whether scales go with the rest's factor: NVFP4's are E4M3 numbers times one number.

    A type of few bits may need another factor than float32 for the same products, and with it
    other E4M3 numbers.
    """
    if "x_scale_scale" not in parts:
        return True
    one, other = (float_values(own["x_scale_scale"]) for own in (parts, exact))
    return np.array_equal(one, other)


def random_codes(matrix: Matrix, seed: int) -> Matrix:
    """Make a twin's weight: random codes, each of which stands for a number, and the same steps."""
    random = np.random.default_rng([2026, seed])
    kind = matrix.kind
    if not kind.is_float:
        codes = random.integers(kind.low, kind.high + 1, size=matrix.shape).astype(np.int8)
        return replace(matrix, codes=codes)
    every = np.arange(1 << kind.bits, dtype=np.uint8)
    usable = every[_is_plain(kind, every)]
    return replace(matrix, codes=random.choice(usable, size=matrix.shape))


def moved_codes(matrix: Matrix, seed: int) -> Matrix:
    """Make a fine-tune's weight: the base's codes, most of them moved by some steps."""
    random = np.random.default_rng([1128, seed])
    kind = matrix.kind
    if not kind.is_float:
        moved = matrix.codes + random.integers(-2, 3, size=matrix.shape)
        return replace(matrix, codes=np.clip(moved, kind.low, kind.high).astype(np.int8))
    flipped = matrix.codes ^ random.integers(0, 4, size=matrix.shape).astype(np.uint8)
    return replace(matrix, codes=np.where(_is_plain(kind, flipped), flipped, matrix.codes))


def _is_plain(kind: Kind, codes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which codes of a float kind stand for a number, and are not -0, as no merge writes."""
    plain: npt.NDArray[np.bool_] = kind.plus_zero(codes) == codes
    plain &= kind.integers(codes) != NOT_A_NUMBER
    return plain
