"""Write the files of a merged checkpoint, every tensor hashed on its way.

Each tensor goes through one small reused buffer per thread: a target is merged, anything else is
read and written. The digests are compared with the base's and with the promised result, so that
nothing gets a name that was not proved, even where the base changes while it is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kilodelta import parallel
from kilodelta.errors import BaseMismatchError, ProofError
from kilodelta.exact import sha256
from kilodelta.export.merge.pairs import Hashing, finish, paired
from kilodelta.export.merge.plan import FilePlan, Piece
from kilodelta.export.merge.tensor import require_result
from kilodelta.files import identity, system
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.copying import pwrite
from kilodelta.files.identity import Identity
from kilodelta.format.delta import Delta
from kilodelta.memory import kept
from kilodelta.merging.devices import Merge
from kilodelta.merging.tensors import merged_whole
from kilodelta.progress import Meter, Progress


@dataclass(frozen=True, kw_only=True)
class MergeStream:
    """What the threads share."""

    checkpoint: Checkpoint
    identity: Identity
    """The base's proved root, and the digests that it is over."""

    delta: Delta
    merge: Merge

    def write(self, plans: list[FilePlan], threads: int | None, progress: Progress) -> None:
        """Write all planned files.

        Raises:
            CheckpointError: the base was cut, cannot be read, or a target holds NaN or infinity.
            BaseMismatchError: a tensor of the base is not what it was when the base was proved.
            ProofError: the merged targets are not the ones that the delta promises.
        """
        meter = Meter("merge", sum(plan.size for plan in plans), "B", progress)
        with _opened(plans) as files, kept():
            meter.add(sum(len(plan.header) for plan in plans))
            written = self._write_pieces(
                [(files[plan.path], piece) for plan in plans for piece in plan.pieces],
                meter,
                threads,
            )
        merged = {piece.name: digest for piece, digest in written if piece.kind == "merge"}
        try:
            require_result(self.delta, {self.target_of(name): merged[name] for name in merged})
        except ProofError:
            self._require_unchanged(merged)  # says so if it was the base that changed
            raise

    def _write_pieces(
        self, jobs: list[tuple[int, Piece]], meter: Meter, threads: int | None
    ) -> list[tuple[Piece, str]]:
        """Write pieces into their files, some at a time, two of them by turns in each thread."""
        batches = paired(
            jobs,
            weight=lambda job: job[1].nbytes,
            fits=lambda job: self._may_share(job[1]),
            threads=threads or os.cpu_count() or 1,
        )
        digests = parallel.run(
            lambda batch: finish([self._write_and_push(*job, meter) for job in batch]),
            batches,
            meter,
            weight=lambda batch: sum(piece.nbytes for _, piece in batch),
            threads=threads,
            count=len,
        )
        pieces = (piece for batch in batches for _, piece in batch)
        return list(zip(pieces, (d for batch in digests for d in batch), strict=True))

    def target_of(self, stored: str) -> str:
        """Return the target whose merged bytes a stored tensor holds: the one of its name."""
        return stored

    def _may_share(self, piece: Piece) -> bool:
        """Return whether a piece may be written by turns with another: it takes little memory."""
        return piece.kind != "merge"

    def _write_and_push(self, descriptor: int, piece: Piece, meter: Meter) -> Hashing[str]:
        """Write one tensor, and start it towards the disk while the next ones are merged."""
        digest = yield from self._write_piece(descriptor, piece, meter)
        system.begin_sync(descriptor, piece.begin, piece.nbytes)
        return digest

    def _write_piece(self, descriptor: int, piece: Piece, meter: Meter) -> Hashing[str]:
        """Write one tensor; returns the digest of what was written, empty for an extra."""
        if piece.kind == "store":
            pwrite(descriptor, self.delta.extras[piece.name].data.data, piece.begin)
            meter.add(piece.nbytes)
            return ""
        info, position = self.checkpoint.info(piece.name), piece.begin
        state = identity.tensor_hash(piece.name, info.dtype, info.shape, sha256.new)
        source = self.checkpoint.tensor(piece.name)
        parts = (
            merged_whole(self.delta, piece.name, source, self.merge)
            if piece.kind == "merge"
            else source.chunks()
        )
        for part in parts:
            yield state, part.data
            pwrite(descriptor, part.data, position)
            position += part.nbytes
            meter.add(part.nbytes)
        digest = "sha256:" + state.hexdigest()
        if piece.kind == "copy":
            self._require_known(piece.name, digest)
        return digest

    def _require_unchanged(self, names: Iterable[str]) -> None:
        for name in names:
            info = self.checkpoint.info(name)
            state = identity.tensor_hash(name, info.dtype, info.shape)
            for part in self.checkpoint.tensor(name).chunks():
                state.update(part.data)
            self._require_known(name, "sha256:" + state.hexdigest())

    def _require_known(self, name: str, digest: str) -> None:
        if digest != self.identity.tensors[name]:
            shard, _ = self.checkpoint.entry(name)
            raise BaseMismatchError(
                f"{name} in {shard.path} is not the base's: it is {digest}, and was "
                f"{self.identity.tensors[name]} when the base was proved",
                fix="something wrote to the file, now or since its digest was remembered: "
                "fetch the base again, and let nothing write to it",
            )


@contextmanager
def _opened(plans: list[FilePlan]) -> Iterator[Mapping[Path, int]]:
    """Make the files in their full size with their headers; yields their descriptors."""
    files: dict[Path, int] = {}
    try:
        for plan in plans:
            files[plan.path] = os.open(plan.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            os.ftruncate(files[plan.path], plan.size)
            pwrite(files[plan.path], memoryview(plan.header), 0)
        yield files
    finally:
        for descriptor in files.values():
            os.close(descriptor)
