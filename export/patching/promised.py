"""Write a file of which somebody has built the whole and stated its digest, in one pass.

The digest covers every byte, so what else could be proved follows from it: that the base's file was
the right one, and that each weight came out right. One thread goes through the new file from its
beginning, takes over what stays as it is, waits for what is computed, and hashes both; others
compute. Only where the digest is another one, base and weights are proved by themselves, to say
what was wrong.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition
from typing import TYPE_CHECKING

import numpy as np

from kilodelta import parallel
from kilodelta.errors import CheckpointError, ProofError
from kilodelta.export.merge.tensor import changed_names
from kilodelta.export.patching.map import FilePlace
from kilodelta.export.patching.placing import Reused
from kilodelta.export.patching.plan import PatchPlan
from kilodelta.export.patching.run import CHUNK, place_tensor, run
from kilodelta.export.patching.strided import put_place
from kilodelta.files import system
from kilodelta.files.copying import clone, copy_range, pread, pwrite
from kilodelta.files.tensor import Bytes
from kilodelta.merging.quantised import MIN_CHANGED
from kilodelta.progress import Meter, Progress, StoppedError, silent

if TYPE_CHECKING:
    from kilodelta.export.merge.in_grid import Tally


@dataclass(kw_only=True, eq=False)
class Stretch:
    """Bytes of the file that are written at once: one place, or matrices that are joined.

    Attributes:
        begin, end: where they lie.
        places: what they consist of.
        data: the base's bytes, into which joined places are put.
        put: how many were.
        written: whether the new file has them.
    """

    begin: int
    end: int
    places: list[FilePlace]
    data: Bytes | None = None
    put: int = 0
    written: bool = False


def write_promised(
    plan: PatchPlan,
    target: int,
    promised: str,
    *,
    min_changed: float = MIN_CHANGED,
    threads: int | None,
    progress: Progress,
) -> None:
    """Write the fine-tune's file, and compare its digest with the one that was stated.

    Args:
        plan: what changes where; of a map with one file.
        target: a descriptor of the new file, empty.
        promised: `sha256:<hex>` of the whole file, as it was built.
        min_changed: the share of a quantised base's codes that has to change.
        threads: cores to compute with; all by default.
        progress: called with how far the work is, in bytes.

    Raises:
        CheckpointError: the base's file is not the one that the map was made for, or cannot be
            read.
        ExportError: a value does not fit into the file's dtype.
        ProofError: the new file has another digest.
        QualityError: fewer codes change.
    """
    # These load the kernels, which a device that only looks at a folder does without.
    from kilodelta.export.merge.in_grid import Tally
    from kilodelta.export.patching.codes.rewrite import ALMOST_NOTHING

    tally = Tally()
    with opened(plan.path(plan.patch_map.files[0].file)) as source:
        digest = _written(_Writer(plan, source, target), plan, tally, threads, progress)
    if digest == promised:
        tally.require(min_changed, ALMOST_NOTHING)
        return
    # Raises where the base's file or the delta is the cause.
    run(
        plan,
        lambda place, data: None,
        min_changed=min_changed,
        threads=threads,
        progress=silent,
    )
    require_promised(plan, digest, promised)


def require_promised(plan: PatchPlan, digest: str, promised: str) -> None:
    """See that a written file's digest is the one that was stated.

    Raises:
        ProofError: it is not.
    """
    if digest != promised:
        raise ProofError(
            f"the patched {plan.patch_map.kind} is {digest}, a build of it is {promised}",
            fix="fetch the map and the file again; else take refit or adapter mode",
        )


def digest_of(descriptor: int) -> str:
    """Return `sha256:<hex>` of an open file."""
    state, done = hashlib.sha256(), 0
    while part := system.read_at(descriptor, CHUNK, done):
        state.update(part)
        done += len(part)
    return f"sha256:{state.hexdigest()}"


def _written(
    writer: _Writer, plan: PatchPlan, tally: Tally, threads: int | None, progress: Progress
) -> str:
    """Write everything, and return the new file's digest."""
    from kilodelta.export.merge.in_grid import at_once
    from kilodelta.export.patching.codes.rewrite import place_codes

    names = sorted((n for n in changed_names(plan.delta) if plan.places(n)), key=writer.first)
    meter = Meter("patch", sum(map(plan.size, names)), "B", progress)

    memory = Reused()

    def work(name: str) -> None:
        if name in plan.patch_map.codes:
            place_codes(plan, name, writer.write, tally)
        else:
            memory.begin()
            place_tensor(plan, name, writer.write, memory=memory)
        meter.add(plan.size(name))

    if plan.delta.grid_targets:
        threads = at_once([plan.size(name) for name in plan.delta.grid_targets], threads)
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(writer.hash_all)
        try:
            # In the order of the file, so that the hash can follow.
            parallel.run(work, names, meter, weight=lambda n: -writer.first(n), threads=threads)
        except BaseException:
            writer.stop()
            raise
        return digest.result()


class _Writer:
    """Writes computed places, copies what lies between them, and hashes all in order."""

    def __init__(self, plan: PatchPlan, source: int, target: int) -> None:
        [fact] = plan.patch_map.files
        self._source, self._target, self._size = source, target, fact.nbytes
        self._path, self._shared = plan.path(fact.file), clone(source, target)
        self._changed, self._stopped = Condition(), False
        names = changed_names(plan.delta)
        self._stretches = _stretches([place for name in names for place in plan.places(name)])
        self._of = {id(place): s for s in self._stretches for place in s.places}
        self._first = {n: min(p.begin for p in plan.places(n)) for n in names if plan.places(n)}

    def first(self, name: str) -> int:
        """Return where the first place of a tensor begins."""
        return self._first[name]

    def write(self, place: FilePlace, data: Bytes) -> None:
        """Write a place; joined ones are written with the last of them."""
        stretch = self._of[id(place)]
        if place.stride or len(stretch.places) > 1:
            joined = self._joined(stretch, place, data)
            if joined is None:
                return
            data = joined
        pwrite(self._target, data.data, stretch.begin)
        with self._changed:
            stretch.written = True
            self._changed.notify_all()

    def _joined(self, stretch: Stretch, place: FilePlace, data: Bytes) -> Bytes | None:
        """Put a place among those that it is joined with; return all of them with the last."""
        with self._changed:
            if stretch.data is None:
                stretch.data = pread(self._path, stretch.begin, stretch.end - stretch.begin)
            put_place(stretch.data, replace(place, begin=place.begin - stretch.begin), data)
            stretch.put += 1
            if stretch.put < len(stretch.places):
                return None
            whole, stretch.data = stretch.data, None
            return whole

    def stop(self) -> None:
        """Let `hash_all` end, since what it waits for will not come."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def hash_all(self) -> str:
        """Copy and hash the file from its beginning, waiting for what is computed.

        Raises:
            CheckpointError: the base's file ends too soon.
            StoppedError: `stop` was called.
        """
        state, buffer, done = hashlib.sha256(), np.empty(CHUNK, np.uint8), 0

        def follow(end: int) -> None:
            nonlocal done
            while done < end:
                part = buffer[: end - done]
                count = system.read_into(self._target, part.data, done)
                if not count:
                    raise CheckpointError(
                        f"{self._path} ends before byte {end}",
                        fix="the file is cut: fetch it again",
                    )
                state.update(part[:count].data)
                system.begin_sync(self._target, done, count)
                done += count

        for stretch in self._stretches:
            self._take_over(done, stretch.begin)
            follow(stretch.begin)
            with self._changed:
                while not (stretch.written or self._stopped):
                    self._changed.wait()
                if self._stopped:
                    raise StoppedError
            follow(stretch.end)
        self._take_over(done, self._size)
        follow(self._size)
        return f"sha256:{state.hexdigest()}"

    def _take_over(self, begin: int, end: int) -> None:
        """Copy what the fine-tune does not change, where the files do not share it already."""
        while begin < end and not self._shared:
            copied = copy_range(self._source, self._target, end - begin, begin, begin)
            if not copied:
                return  # `follow` says so
            begin += copied


def _stretches(places: Sequence[FilePlace]) -> list[Stretch]:
    """Join places that lie between each other's rows; return all in the order of the file."""
    out: list[Stretch] = []
    for place in sorted(places, key=lambda place: place.begin):
        end = place.begin + place.span
        if out and place.begin < out[-1].end:
            out[-1].places.append(place)
            out[-1].end = max(out[-1].end, end)
        else:
            out.append(Stretch(begin=place.begin, end=end, places=[place]))
    return out


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Yield a descriptor of a file to read.

    Raises:
        CheckpointError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem.strerror or problem}", fix="check the path"
        ) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)
