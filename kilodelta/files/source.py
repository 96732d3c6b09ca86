"""Read files by position that something else may cut or change meanwhile; map weights by choice.

Memory-mapped pages of a file that shrinks kill the process (SIGBUS); for a `SourceFile` it is an
error. A file that is replaced stays the one that was opened. A `FileMap` is for weights that a long
computation reads again and again, where a copy would double the memory: whoever maps a file says so
in the documentation.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import overload

import numpy as np

from kilodelta.errors import CheckpointError, KiloDeltaError
from kilodelta.files import plain, system
from kilodelta.files.tensor import Bytes

CHUNK = 1 << 20
"""Bytes read at a time, hashed and written while they are in the second cache."""

_BLOCK = 1 << 14  # of a parser's bytes: headers lie close together, weights are skipped

Key = tuple[int, int, int, int, int]

_DROP = getattr(mmap, "MADV_DONTNEED", None)
_FIX = "let nothing write to it, check the disk, and start again"


class SourceFile:
    """A file that is open for reading as long as this object lives; threads may share it.

    Args:
        path: the file.
        error: the class of the errors about it.
        follow: whether it may be any link; else only one of a Hugging Face cache to its own blobs.

    Raises:
        KiloDeltaError: of class `error`: it cannot be opened, or is no regular file.
    """

    def __init__(
        self, path: Path, *, error: type[KiloDeltaError] = CheckpointError, follow: bool = True
    ) -> None:
        with plain.explained(path, error):
            self._descriptor = (
                plain.open_file(path, follow=True) if follow else plain.open_model_file(path)
            )
        # Unlike __del__, a finalizer runs at exit as well, while modules are still whole.
        weakref.finalize(self, os.close, self._descriptor)
        self.path, self._error = path, error
        self._status = os.fstat(self._descriptor)

    @property
    def size(self) -> int:
        """Bytes that the file had when it was opened."""
        return self._status.st_size

    @property
    def key(self) -> Key:
        """What a change of the file alters: device, inode, size, and times in ns."""
        return _key(self._status)

    def map(self) -> FileMap:
        """Map the whole file; cutting it while the map is in use kills the process.

        Raises:
            OSError: the file cannot be mapped.
        """
        return FileMap(self._descriptor)

    def is_unchanged(self) -> bool:
        """Return whether the content still is as it was, as far as size and time tell.

        Writes through a memory map alter the time late or never. A file that was renamed or
        removed meanwhile is unchanged.
        """
        now = os.fstat(self._descriptor)
        return (now.st_size, now.st_mtime_ns) == (self.size, self._status.st_mtime_ns)

    def fault(self, what: str, *, fix: str) -> KiloDeltaError:
        """Make the error that the file breaks a rule of its kind."""
        return self._error(f"{self.path}: {what}", fix=fix)

    def read(self, begin: int, nbytes: int) -> Bytes:
        """Read bytes into new memory, uint8 `(nbytes,)`.

        Raises:
            KiloDeltaError: the file ends before, or cannot be read.
        """
        data = np.empty(nbytes, np.uint8)
        self.read_into(data, begin)
        return data

    def read_into(self, part: Bytes, begin: int) -> None:
        """Fill an array with the bytes from a position.

        Raises:
            KiloDeltaError: the file ends before, or cannot be read.
        """
        view, position = memoryview(part.data), begin
        while view:
            try:
                count = system.read_into(self._descriptor, view, position)
            except OSError as problem:
                raise self._error(
                    f"{self.path} cannot be read: {problem.strerror or problem}", fix=_FIX
                ) from None
            if not count:
                raise self._error(
                    f"{self.path} ends at byte {os.fstat(self._descriptor).st_size} of "
                    f"{self.size}: it was cut since it was opened",
                    fix=_FIX,
                )
            view, position = view[count:], position + count


class FileMap:
    """A whole file as private pages, mapped for as long as views of it live.

    Args:
        descriptor: of a file open for reading that is not empty; it may be closed afterwards.

    Raises:
        OSError: the file cannot be mapped.

    Example:
        >>> with open("tests/golden/0.1.0/base.safetensors", "rb") as file:
        ...     view = FileMap(file.fileno()).view(8, 2)
        >>> bytes(view)
        b'{"'
    """

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)

    def view(self, begin: int, nbytes: int) -> memoryview:
        """Return bytes as writable memory; what is written stays in this process."""
        return memoryview(self._map)[begin : begin + nbytes]

    def release(self, begin: int, nbytes: int) -> None:
        """Give the memory of bytes back; a later reader gets them from the file again.

        What was written into them is lost. The pages at both ends stay, as others may share them.
        """
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (begin + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if _DROP is not None and length > 0:
            self._map.madvise(_DROP, first, length)


class FileBytes:
    """A file's bytes for a parser that reads short pieces here and there, as `bytes` would be.

    Blocks are read when they are asked for, so a file that is cut meanwhile is an error; pages of a
    memory map would kill the process.

    Args:
        file: the file; its size when it was opened counts.

    Raises:
        KiloDeltaError: of the file's class: it is empty. Reading raises what
            `SourceFile.read_into` does.

    Example:
        >>> data = FileBytes(SourceFile(Path("tests/golden/0.1.0/base.safetensors")))
        >>> len(data), data[8:10], data[8]
        (1464, b'{"', 123)
    """

    def __init__(self, file: SourceFile) -> None:
        if not file.size:
            raise file.fault("it is empty", fix="fetch it again")
        self._file, self._begin, self._block = file, 0, b""

    def __len__(self) -> int:
        return self._file.size

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> bytes: ...
    def __getitem__(self, place: int | slice) -> int | bytes:
        if isinstance(place, slice):
            start, stop, _ = place.indices(len(self))
            return self._file.read(start, max(0, stop - start)).tobytes()
        index = place - self._begin
        if not 0 <= index < len(self._block):
            self._begin, index = place, 0
            self._block = self[place : place + _BLOCK]
        return self._block[index]


class TensorBytes:
    """A tensor's bytes in a file, read when they are sliced, as an array would be: uint8 `(n,)`.

    A slice is overwritten by the next one. Each thread makes an object for itself.
    """

    def __init__(self, file: SourceFile, begin: int, nbytes: int) -> None:
        self._file, self._begin, self.size = file, begin, nbytes
        self._buffer = np.empty(0, np.uint8)

    def __getitem__(self, span: slice) -> Bytes:
        """Read a slice of step 1.

        Raises:
            CheckpointError: the file ends before the slice does, or cannot be read.
        """
        start, stop, _ = span.indices(self.size)
        if self._buffer.size < stop - start:
            self._buffer = np.empty(stop - start, np.uint8)
        part = self._buffer[: stop - start]
        self._file.read_into(part, self._begin + start)
        return part

    def chunks(self, nbytes: int = CHUNK) -> Iterator[Bytes]:
        """Read everything in order, `nbytes` at a time.

        Raises:
            CheckpointError: as for a slice.
        """
        for start in range(0, self.size, nbytes):
            yield self[start : start + nbytes]


def file_key(path: Path) -> Key:
    """Return what a change of a file alters: device, inode, size, and times in ns.

    Raises:
        OSError: there is no such file.
    """
    return _key(path.stat())


def _key(status: os.stat_result) -> Key:
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip
