"""A double of an engine's compiler for quantised models: codes among other bytes.

What it does to each weight of `write_base` is in the weight's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from kilodelta.files.tensor import RawTensor
from kilodelta.grid import Matrix, QuantisedModel, open_quantised
from kilodelta.grid.quantise import quantise_folder
from tests.support import making

SHAPES: Mapping[str, tuple[int, int]] = {
    "plain.weight": (6, 64),
    "turned.weight": (8, 64),
    "twice.weight": (4, 32),
    "unpacked.weight": (6, 32),
    "swizzled.weight": (8, 32),
    "few.weight": (1, 6),
}
BIAS = np.linspace(-1, 1, 12, dtype=np.float32)


def write_base(
    folder: Path, precision: str, copies: Mapping[str, str] = MappingProxyType({})
) -> QuantisedModel:
    """Write a quantised model whose weights the double lays out in different ways.

    Args:
        folder: for it.
        precision: as `quantise_folder` takes it.
        copies: names of further weights, which equal those that they lead to.
    """
    random = np.random.default_rng(3)
    floats = {n: random.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}
    floats |= {name: floats[source] for name, source in copies.items()}
    floats["bias"] = BIAS
    tensors = {n: ("F32", a.shape, a.tobytes()) for n, a in floats.items()}
    base = making.folder(folder / "floats", tensors)
    chosen = [n for n in (*SHAPES, *copies) if precision == "fp8" or n != "few.weight"]
    quantise_folder(base, folder / "base", precision, chosen.__contains__)
    return open_quantised(folder / "base")


def stream(codes: Any, bits: int) -> bytes:
    """Pack codes one by one, two to a byte and the first one low where they have four bits."""
    each = [int(code) & (255 if bits == 8 else 15) for code in codes.reshape(-1)]
    if bits == 8:
        return bytes(each)
    return bytes(low | high << 4 for low, high in zip(each[::2], each[1::2], strict=True))


class Compiler:
    """Builds engines of a quantised base; of every three builds one is numbered oddly.

    Args:
        base: the model.
        spoil: changes an engine's bytes, given all weights.
    """

    def __init__(
        self, base: QuantisedModel, spoil: Callable[[bytes, Mapping[str, Matrix]], bytes]
    ) -> None:
        self._base, self._spoil, self.builds = base, spoil, 0

    def __call__(self, changed: Mapping[str, Any], out: Path) -> None:
        own = {name: changed.get(name, self._base.matrix(name)) for name in self._base.stored}
        bias = changed.get("bias", RawTensor.of(BIAS))
        data = engine(own, bias.data.tobytes(), 7 if self.builds % 3 else 8)
        out.write_bytes(self._spoil(data, own))
        self.builds += 1


def scales(matrix: Matrix) -> Any:
    """The scales that an engine holds: of NVFP4 the bytes of E4M3 numbers, without their factor."""
    if matrix.kind.name != "e2m1":
        return matrix.steps.astype(np.float32)
    top = 2.0 ** np.ceil(np.log2(matrix.steps.max() / 448))  # our quantiser's factor
    return (matrix.steps / top).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def engine(own: Mapping[str, Matrix], bias: bytes = BIAS.tobytes(), number: int = 7) -> bytes:
    """Compile weights, equal codes once; `number` is that of an internal value in this build."""
    parts = [f"engine of __mye{number}".encode(), bias]
    seen: set[bytes] = set()
    for name, matrix in own.items():
        codes, bits, steps = matrix.codes, matrix.kind.bits, scales(matrix)
        if stream(codes, bits) in seen:
            continue
        seen.add(stream(codes, bits))
        match name.split(".")[0]:
            case "plain" | "few":
                parts += [stream(codes, bits), steps.tobytes()]
            case "turned":
                parts += [stream(codes.T, bits), steps.T.tobytes()]
            case "twice":
                parts += [stream(codes, bits), stream(codes.T, bits), steps.tobytes()]
            case "unpacked":
                parts += [matrix.values().astype(np.float16).tobytes()]
            case "swizzled":
                parts += [stream(codes.reshape(2, 4, -1).transpose(1, 0, 2), bits), steps.tobytes()]
    return b"|".join(parts)
