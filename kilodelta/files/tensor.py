"""One tensor: what it is (`TensorInfo`), and its bytes in memory (`RawTensor`)."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import InputError
from kilodelta.files import dtypes

Bytes = npt.NDArray[np.uint8]

GRID = "GRID"
"""The dtype of a weight (out, in) that a model stores as codes and scales: no type of safetensors,
so no bytes of its own."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A tensor's name, safetensors dtype and shape.

    Example:
        >>> TensorInfo(name="w", dtype="BF16", shape=(3, 5)).nbytes
        30
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data in a file."""
        return dtypes.nbytes(self.dtype, self.shape)


@dataclass(frozen=True, kw_only=True)
class RawTensor:
    """A tensor's safetensors dtype, shape and raw little-endian bytes, uint8 `(n,)`."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes

    @classmethod
    def of(cls, value: Any) -> RawTensor:
        """View a numpy array or torch tensor as raw bytes; copies only where the layout demands.

        Raises:
            InputError: neither of the two, without data, or of a dtype that safetensors lacks.

        Example:
            >>> RawTensor.of(np.array([[1, 2]], ">i2"))
            RawTensor(dtype='I16', shape=(1, 2), data=array([1, 0, 2, 0], dtype=uint8))
        """
        if isinstance(value, np.ndarray):
            name, data = value.dtype.name, _little_endian(value)
        elif hasattr(value, "data_ptr"):
            name, data = str(value.dtype).removeprefix("torch."), _torch_bytes(value)
        else:
            raise InputError(
                f"a {type(value).__name__} is not a tensor",
                fix="give torch tensors or numpy arrays",
            )
        if name not in dtypes.BY_LONG:
            raise InputError(
                f"dtype {name} has no safetensors name", fix="convert the tensor first"
            )
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return cls(dtype=dtypes.BY_LONG[name].name, shape=tuple(map(int, value.shape)), data=flat)

    @classmethod
    def copy_of(cls, value: Any) -> RawTensor:
        """Copy a numpy array or torch tensor, so that later changes of it do not matter.

        Raises:
            InputError: as `of`.
        """
        raw = cls.of(value)
        return cls(dtype=raw.dtype, shape=raw.shape, data=raw.data.copy())

    @property
    def nbytes(self) -> int:
        return self.data.size

    def equals(self, other: RawTensor) -> bool:
        """Return whether another tensor has the same type, shape and bytes.

        Example:
            >>> RawTensor.of(np.zeros(2)).equals(RawTensor.of(np.zeros(2, np.float32)))
            False
        """
        same = (self.dtype, self.shape) == (other.dtype, other.shape)
        return same and np.array_equal(self.data, other.data)

    def info(self, name: str) -> TensorInfo:
        """Describe this tensor under a name."""
        return TensorInfo(name=name, dtype=self.dtype, shape=self.shape)

    def values(self) -> npt.NDArray[Any]:
        """View the bytes as numbers of this shape; types that numpy lacks as their bits.

        Example:
            >>> RawTensor.of(np.float32([[1, 2]])).values()
            array([[1., 2.]], dtype=float32)
        """
        return self.data.view(dtypes.DTYPES[self.dtype].storage).reshape(self.shape)


def _little_endian(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # `dtype.str` spells the byte order out even where it is the machine's own.
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.str[0] == ">" else array


def _torch_bytes(tensor: Any) -> Bytes:
    """Return a torch tensor's bytes; torch is imported already, or there would be no tensor."""
    if tensor.is_meta:
        raise InputError(
            "a tensor lies on the meta device and has no data", fix="load the weights first"
        )
    if str(tensor.layout) != "torch.strided":
        raise InputError(f"a tensor is {tensor.layout}", fix="convert it by to_dense() first")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: Bytes = flat.view(sys.modules["torch"].uint8).numpy()
    return raw
