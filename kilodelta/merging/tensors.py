"""Merge a whole tensor of the base: the one matrix that it is, or every matrix of a stack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kilodelta.files.tensor import Bytes
from kilodelta.format.delta import Delta

if TYPE_CHECKING:  # the kernels come with numba, for which nothing here has to wait
    from kilodelta.merging.cpu import ByteSource
    from kilodelta.merging.devices import Merge


class Span:
    """Some of a source's bytes, read as they are sliced.

    Args:
        source: the whole.
        begin: the first byte.
        size: how many there are.
    """

    def __init__(self, source: ByteSource, begin: int, size: int) -> None:
        self._source, self._begin, self.size = source, begin, size

    def __getitem__(self, span: slice, /) -> Bytes:
        start, stop, _ = span.indices(self.size)
        return self._source[self._begin + start : self._begin + stop]


def merged_whole(delta: Delta, name: str, base: ByteSource, merge: Merge) -> Iterator[Bytes]:
    """Yield a merged tensor's bytes in order; a piece is overwritten by a later one.

    Args:
        delta: bound to the base.
        name: one of `delta.tensors`.
        base: the base tensor's raw bytes.
        merge: merges one matrix, such as `kilodelta.merging.cpu.merged`.

    Raises:
        CheckpointError: the base tensor holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.

    Example:
        >>> import kilodelta
        >>> from kilodelta.merging import cpu
        >>> base = kilodelta.Checkpoint.open("tests/golden/0.1.0/base.safetensors")
        >>> delta = kilodelta.load("tests/golden/0.1.0/lora-8.kd", base=base)
        >>> data = base.data("tall.weight")
        >>> sum(part.nbytes for part in merged_whole(delta, "tall.weight", data, cpu.merged))
        88
    """
    begin = 0
    for target in delta.tensors[name]:
        size = target.nbytes
        yield from merge(delta, target, base if size == base.size else Span(base, begin, size))
        begin += size
