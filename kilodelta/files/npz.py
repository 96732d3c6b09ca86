"""`.npz` files of plain arrays: what they hold is known, and checked, before it is unpacked.

A zip of a hundred kilobytes may unpack to gigabytes, and its headers may ask for more memory than
there is. So the headers are read alone first; an array's stated shape must take exactly the bytes
that the zip states for it; and a caller can refuse what does not fit a model, or take only the
first rows, before the rest is read.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import io
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from kilodelta.errors import InputError
from kilodelta.files import staging

KINDS = "biuf"
"""Kinds of numpy dtypes that models take: booleans, integers and floats."""
FREE, TIMES = 64 << 20, 4
"""What `read_modest` unpacks: `FREE` bytes and `TIMES` the file's own size."""
TEXTS = frozenset({".txt", ".jsonl", ".json", ".csv", ".tsv"})
_FIX = "write it with numpy.savez(path, name=array)"
_SUFFIX = ".npy"


@dataclass(frozen=True, kw_only=True)
class ArrayHeader:
    """What one array of an `.npz` file is, before its data are read."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    """Whether the data lie in column-major order."""

    @property
    def nbytes(self) -> int:
        """Bytes of the unpacked data."""
        return prod(self.shape) * self.dtype.itemsize


def read_headers(path: str | os.PathLike[str]) -> dict[str, ArrayHeader]:
    """Read the names, dtypes and shapes of the arrays in an `.npz` file, not their data.

    Args:
        path: the file.

    Raises:
        InputError: the file is missing, no `.npz` file, damaged, empty, or holds something else
            than arrays of booleans, integers and floats.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()) / "a.npz"
        >>> np.savez(place, ids=np.zeros((3, 5), np.int64))
        >>> read_headers(place)["ids"].shape
        (3, 5)
    """
    place = Path(path)
    with _opened(place) as archive:
        headers = {name: _header(place, archive, info) for name, info in _members(place, archive)}
    if not headers:
        raise InputError(f"{place} holds no arrays", fix="give one array per input")
    return headers


def read_npz(path: str | os.PathLike[str], *, rows: int | None = None) -> dict[str, NDArray[Any]]:
    """Read the arrays of an `.npz` file, or the first rows of each.

    Args:
        path: the file.
        rows: how many entries of each array's first axis to read; None reads all.

    Raises:
        InputError: as `read_headers`, or the arrays do not fit the memory.
    """
    headers = read_headers(path)
    place = Path(path)
    try:
        with _opened(place) as archive:
            return {
                name: _array(archive, info, headers[name], rows)
                for name, info in _members(place, archive)
            }
    except MemoryError:
        total = sum(header.nbytes for header in headers.values())
        raise InputError(
            f"the arrays of {place} take {total} bytes, which do not fit the memory",
            fix="give fewer rows, or package.module:function, which yields batches",
        ) from None


def read_modest(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Read the arrays of an `.npz` file for which no model can say what fits.

    Raises:
        InputError: as `read_npz`, or unpacked the arrays would take far more than the file does.
    """
    unpacked = sum(header.nbytes for header in read_headers(path).values())
    size = os.path.getsize(path)
    if unpacked > FREE + TIMES * size:
        raise InputError(
            f"{path} has {size} bytes and would take {unpacked} unpacked",
            fix="write it with numpy.savez, which does not compress",
        )
    return read_npz(path)


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays, in full or not at all; an earlier file is replaced.

    Unlike `numpy.savez`, equal arrays give equal bytes, and an array may be called `file`.

    Raises:
        OutputError: they cannot be written.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as container:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}{_SUFFIX}")  # of a fixed date
            with container.open(member, "w", force_zip64=True) as file:
                npy.write_array(file, np.asanyarray(array), allow_pickle=False)
    staging.write(Path(path), archive.getbuffer())


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the archive; every error of its reader becomes a sentence."""
    try:
        if path.suffix in TEXTS and path.is_file():
            raise InputError(
                f"{path} holds texts; arrays are wanted",
                fix="tokenize the texts, and write the arrays by numpy.savez(path, input_ids=...)",
            )
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for without end
            raise InputError(f"{path} is not a regular file", fix="give an .npz file")
        _refuse_bare_array(path)
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", fix="check the path") from None
    except Exception as problem:  # zipfile, zlib and numpy raise some ten unrelated classes
        raise InputError(
            f"{path} is not an .npz file of plain arrays: {problem or type(problem).__name__}",
            fix=_FIX,
        ) from None


def _refuse_bare_array(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(6) == npy.MAGIC_PREFIX:
            raise InputError(
                f"{path} is a .npy file: one array, without the name of its input",
                fix="write it with numpy.savez(path, input_ids=array), by the input's name",
            )


def _members(path: Path, archive: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    seen: set[str] = set()
    for info in archive.infolist():
        name = info.filename.removesuffix(_SUFFIX)
        if name == info.filename:
            raise InputError(f"{path} holds {name!r:.80}, which is no array", fix=_FIX)
        if name in seen:
            raise InputError(f"{path} holds {name!r:.80} twice", fix=_FIX)
        seen.add(name)
        yield name, info


def _header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> ArrayHeader:
    with archive.open(info) as file:
        header = _parse(file)
        stated = file.tell() + header.nbytes
    if header.dtype.kind not in KINDS:
        raise InputError(
            f"{path}: {info.filename.removesuffix(_SUFFIX)} is an array of {header.dtype}",
            fix="give floats, integers or booleans",
        )
    if stated != info.file_size:
        raise ValueError(f"{info.filename} states {stated} bytes and holds {info.file_size}")
    return header


def _parse(file: IO[bytes]) -> ArrayHeader:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return ArrayHeader(dtype=dtype, shape=tuple(map(int, shape)), fortran=bool(fortran))


def _array(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: ArrayHeader, rows: int | None
) -> NDArray[Any]:
    """Read one array; only the first rows where they come first in the file."""
    cut = rows is not None and bool(header.shape) and rows < header.shape[0]
    shape = (rows or 0, *header.shape[1:]) if cut and not header.fortran else header.shape
    with archive.open(info) as file:
        _parse(file)
        array = np.empty(shape[::-1] if header.fortran else shape, header.dtype)
        _fill(file, array.reshape(-1).view(np.uint8))  # zipfile checks the CRC at the end
    array = array.T if header.fortran else array
    return array[:rows] if cut else array


def _fill(file: IO[bytes], out: NDArray[np.uint8]) -> None:
    """Read exactly as many bytes as `out` takes."""
    view, done = out.data, 0
    while done < len(view):
        part = file.read(min(1 << 20, len(view) - done))
        if not part:
            raise EOFError("the data end early")
        view[done : done + len(part)] = part
        done += len(part)


def names_and_shapes(headers: Mapping[str, ArrayHeader]) -> str:
    """List arrays for a sentence.

    Example:
        >>> names_and_shapes({"x": ArrayHeader(dtype=np.dtype("u1"), shape=(2, 3), fortran=False)})
        'x uint8 (2, 3)'
    """
    return ", ".join(f"{name} {h.dtype} {h.shape}" for name, h in headers.items())
