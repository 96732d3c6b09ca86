"""What a layout is: how one quantised weight lies in stored tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError
from kilodelta.files.dtypes import DTYPES, FLOATS
from kilodelta.files.tensor import RawTensor
from kilodelta.grid.codes import E2M1, Kind, e4m3_values
from kilodelta.grid.matrix import Floats, Matrix, Shape

Parts = Mapping[str, RawTensor]
"""The stored tensors of one weight, by role."""

Codes = npt.NDArray[Any]
Stream = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Layout(ABC):
    """How one weight is stored; a subclass is one layout, its fields are the weight's parameters.

    Attributes:
        name: of the layout, as its tool writes it.
        codes_in: the role of the tensor that holds the codes, the only one that a merge changes.
        shape: (out, in) of the weight.
    """

    name: ClassVar[str]
    codes_in: ClassVar[str]

    shape: Shape

    @abstractmethod
    def unpack(self, parts: Parts) -> Matrix:
        """Read the stored tensors, which `require` has not looked at yet.

        Raises:
            CheckpointError: one is missing, or of a type or size that does not fit.
        """

    @abstractmethod
    def recode(self, parts: Parts, codes: Codes) -> RawTensor:
        """Write new codes, (out, in) as `Matrix.codes`, into the tensor that holds them.

        Everything else in that tensor (padding, and the scales inside GGUF's blocks) stays.
        """


class RowLayout(Layout):
    """A layout that stores the codes of a row together, and rows one after the other.

    So a weight can be merged some rows at a time: `grid` once, then `decode` and `encode`.
    """

    @property
    def nibble_offset(self) -> int | None:
        """What is added to a code for the nibble that is stored; None unless rows are only nibbles.

        Then a row is `in / 2` bytes with the code of column 2 j in the low half of byte j, and
        no bit of it is anything but a code.
        """
        return None

    @abstractmethod
    def grid(self, parts: Parts) -> Matrix:
        """Read all but the codes, which are `no_codes`; of their tensor only the type is read."""

    @abstractmethod
    def packed(self, parts: Parts) -> RawTensor:
        """Return the tensor of the codes, its type and shape checked."""

    @abstractmethod
    def decode(self, stream: Stream) -> Codes:
        """Read the codes of some rows, (rows, in), from their bytes, (rows, nbytes)."""

    @abstractmethod
    def encode(self, stream: Stream, codes: Codes) -> Stream:
        """Return the bytes of some rows with new codes; bytes and bits that hold none stay."""

    def unpack(self, parts: Parts) -> Matrix:
        grid = self.grid(parts)
        return replace(grid, codes=self.decode(self._stream(parts)))

    def recode(self, parts: Parts, codes: Codes) -> RawTensor:
        packed, stream = self.packed(parts), self.encode(self._stream(parts), codes)
        return RawTensor(dtype=packed.dtype, shape=packed.shape, data=stream.reshape(-1))

    def _stream(self, parts: Parts) -> Stream:
        return self.packed(parts).data.reshape(self.shape[0], -1)


def no_codes(kind: Kind, shape: Shape) -> Codes:
    """Return zeros in place of codes that are read later; they take no memory."""
    return np.broadcast_to(np.zeros((), kind.dtype), shape)


def part(parts: Parts, role: str, name: str, dtypes: tuple[str, ...]) -> RawTensor:
    """Return the stored tensor of a role.

    Args:
        parts: the weight's tensors.
        role: which one.
        name: of the layout, for the error.
        dtypes: safetensors types that it may have.

    Raises:
        CheckpointError: it is missing or of another type.
    """
    if role not in parts:
        raise CheckpointError(
            f"{name}: the weight has no {role}, without which its codes have no value",
            fix="the checkpoint is incomplete: fetch it again, all shards",
        )
    found = parts[role]
    if found.dtype not in dtypes:
        raise CheckpointError(
            f"{name}: {role} is {found.dtype}, not {' or '.join(dtypes)}",
            fix="the checkpoint is not in the layout that its configuration names: convert it anew",
        )
    return found


def sized(tensor: RawTensor, role: str, name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Check a stored tensor's shape.

    Args:
        tensor: as it is stored.
        role: what it holds, for the error.
        name: of the weight that it is a part of.
        shapes: those that it may have.

    Raises:
        CheckpointError: it is none of `shapes`.
    """
    if tensor.shape not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(
            f"{name}: {role} has shape {list(tensor.shape)}, not {wanted}",
            fix="the checkpoint is not in the layout that its configuration names: convert it anew",
        )


def float_values(tensor: RawTensor) -> Floats:
    """Return the values of a tensor of floats, exactly, float64 in its shape."""
    if tensor.dtype == "F8_E4M3":
        return e4m3_values(tensor.data).reshape(tensor.shape)
    if tensor.dtype == "F16" and tensor.data.size > 1 << 16:
        from kilodelta.exact.rounding import widen_f16  # loads numba, which takes a while

        wide = np.empty(tensor.shape, np.float64)
        widen_f16(tensor.data.view(np.uint16), wide.reshape(-1))
        return wide
    return FLOATS[tensor.dtype].widen(tensor.data).astype(np.float64).reshape(tensor.shape)


SCALES = ("F32", "F16", "BF16")
"""Types of scales."""


def rows_of(tensor: RawTensor) -> npt.NDArray[np.uint8]:
    """View a tensor of two dimensions as the bytes of its rows, uint8 (rows, nbytes)."""
    return tensor.data.reshape(tensor.shape[0], -1)


def columns_as_rows(tensor: RawTensor) -> npt.NDArray[np.uint8]:
    """Transpose a matrix of words; return the bytes of the new rows, uint8 (columns, nbytes)."""
    words = tensor.data.view(DTYPES[tensor.dtype].storage).reshape(tensor.shape)
    return np.ascontiguousarray(words.T).view(np.uint8).reshape(tensor.shape[1], -1)


def from_columns(rows: npt.NDArray[np.uint8], like: RawTensor) -> RawTensor:
    """Undo `columns_as_rows`: a tensor of the type and shape of `like`."""
    words = np.ascontiguousarray(rows).view(DTYPES[like.dtype].storage)
    flat = np.ascontiguousarray(words.T).reshape(-1).view(np.uint8)
    return RawTensor(dtype=like.dtype, shape=like.shape, data=flat)


def order_of(groups: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.int32] | None:
    """Return the group of each column, or None where columns follow each other in groups.

    Many writers store the natural order as well, which kernels and ONNX operators need not be told.

    Args:
        groups: the stored order, int32 (in,).
        size: columns of a group.

    Example:
        >>> order_of(np.array([0, 0, 1, 1], np.int32), 2) is None
        True
    """
    return None if np.array_equal(groups, np.arange(groups.size) // size) else groups


def centred(stored: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.int8]:
    """Turn unsigned codes into signed ones: a stored u is u - 2^(bits-1)."""
    return (stored - np.uint8(1 << (bits - 1))).view(np.int8)  # modulo 256


def uncentred(codes: Codes, bits: int) -> npt.NDArray[np.uint8]:
    """Undo `centred`."""
    flat: npt.NDArray[np.uint8] = np.ascontiguousarray(codes).view(np.uint8)
    return flat + np.uint8(1 << (bits - 1))


def nibbles(codes: Codes, kind: Kind) -> npt.NDArray[np.uint8]:
    """Return the four bits that codes are stored in: E2M1's own, or two's complement."""
    return codes if kind is E2M1 else codes.view(np.uint8) & np.uint8(15)


def signed_nibbles(stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.int8]:
    """Read nibbles as two's complement, -8 to 7."""
    return ((stored ^ np.uint8(8)).astype(np.int8) - np.int8(8)).astype(np.int8)
