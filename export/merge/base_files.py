"""Read a base's tensors by position, while something else may cut or change its files.

Memory-mapped pages of a file that shrinks kill the process (SIGBUS); here it is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import numpy as np

from kilodelta.errors import CheckpointError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import Bytes, TensorInfo

CHUNK = 1 << 20
"""Bytes read at a time, hashed and written while they are in the second cache."""

_FIX = "let nothing write to the base, check the disk, and start again"


class BaseFiles:
    """The files of a checkpoint, opened once; used in a `with` block, from several threads.

    Raises:
        CheckpointError: a file cannot be opened.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._descriptors: dict[Path, int] = {}
        self._stack = ExitStack()

    def __enter__(self) -> BaseFiles:
        with ExitStack() as stack:
            for shard in self._checkpoint.shards:
                descriptor = _open(shard.path)
                stack.callback(os.close, descriptor)
                self._descriptors[shard.path] = descriptor
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What the tensors are, by name."""
        return {name: self._checkpoint.info(name) for name in self._checkpoint.names}

    def tensor(self, name: str) -> TensorBytes:
        """The bytes of one tensor; nothing is read yet."""
        shard, entry = self._checkpoint.entry(name)
        return TensorBytes(name, shard.path, self._descriptors[shard.path], entry.begin, entry.end)


class TensorBytes:
    """A tensor's bytes in a file, read when they are sliced, as an array would be: uint8 `(n,)`.

    A slice is overwritten by the next one. Each thread makes an object for itself.
    """

    def __init__(self, name: str, path: Path, descriptor: int, begin: int, end: int) -> None:
        self._name, self._path, self._descriptor, self._begin = name, path, descriptor, begin
        self.size = end - begin
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
        self._read(part, self._begin + start)
        return part

    def chunks(self, nbytes: int = CHUNK) -> Iterator[Bytes]:
        """Read everything in order, `nbytes` at a time.

        Raises:
            CheckpointError: as for a slice.
        """
        for start in range(0, self.size, nbytes):
            yield self[start : start + nbytes]

    def _read(self, part: Bytes, position: int) -> None:
        view = part.data
        while view:
            try:
                count = os.preadv(self._descriptor, [view], position)
            except OSError as problem:
                raise CheckpointError(
                    f"{self._path} cannot be read: {problem.strerror or problem}", fix=_FIX
                ) from None
            if not count:
                raise CheckpointError(
                    f"{self._path} ends at byte {position}, within the tensor {self._name}: it was "
                    f"cut since it was opened",
                    fix=_FIX,
                )
            view, position = view[count:], position + count


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        raise CheckpointError(
            f"{path} cannot be opened: {problem.strerror or problem}",
            fix="check the path and its permissions",
        ) from None
