"""`kilodelta apply`: prove, build beside the old, probe, and commit by one rename; or roll back.

Nothing that is served is touched before the rename, and everything it will serve lies on the disk
by then. So a process killed at any point, or a full disk, leaves the old state or the new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.device.folder import bundle as bundles
from kilodelta.device.folder import fine_tune, journal, lock, state
from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.places import Places
from kilodelta.device.folder.recover import recover, sweep
from kilodelta.device.folder.state import Served, State
from kilodelta.device.golden import golden
from kilodelta.device.golden.base_outputs import device_base
from kilodelta.device.golden.probe import Seen, probe
from kilodelta.device.modes import Mode, Session, open_mode
from kilodelta.device.update import admit
from kilodelta.errors import KiloDeltaError
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.progress import Event, Progress, silent

STEPS = ("proved", "built", "probed", "committed")


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What an apply did: the state that it made, the state before, and what the probe saw."""

    state: State
    before: State
    seen: Seen

    def to_json(self) -> dict[str, Any]:
        return {
            "serving": vars(self.state.serving),
            "before": vars(self.before.serving),
            "sequence": self.state.sequence,
            "probe": self.seen.to_json(),
        }


def apply(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    allow_downgrade: bool = False,
    progress: Progress = silent,
) -> Applied:
    """Serve another fine-tune from a device folder.

    Args:
        folder: the device folder.
        file: the `.kd` file.
        allow_downgrade: take a file whose version is lower than the highest this device has had.

    Raises:
        DeviceError: no device folder, or a damaged one.
        LockedError: another command is changing it.
        FileError, BaseMismatchError, DowngradeError, InputError: the file is damaged, for another
            base, too old, or of a kind that this folder's mode cannot take.
        ProofError: the probe failed; what was served before goes on.
        OutputError: the disk is full or not writable; what was served before goes on.
    """
    places = Places.open(folder)
    with lock.held(places.lock):
        bundle, before = bundles.read(places), recover(places)
        job = _Job(places=places, bundle=bundle, before=before, file=Path(file), progress=progress)
        with undone(places, before.sequence + 1):
            return job.run(allow_downgrade)


@contextlib.contextmanager
def undone(places: Places, sequence: int) -> Iterator[None]:
    """On any error remove what is not served, and write the error down; the state stands."""
    try:
        yield
    except BaseException as problem:
        with contextlib.suppress(KiloDeltaError, OSError):
            standing = state.read(places)
            sweep(places, standing)
            what = getattr(problem, "what", type(problem).__name__)
            journal.append(places.journal, "failed", sequence, why=what, state=standing.to_json())
        raise


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One apply, under the lock."""

    places: Places
    bundle: Bundle
    before: State
    file: Path
    progress: Progress

    def run(self, allow_downgrade: bool) -> Applied:
        digest = self._digest()
        tensors = bundles.read_tensors(self.places)
        delta = admit.bind(self.bundle, tensors, load(self.file))
        fresh = self._named(digest, admit.version(delta))
        if not allow_downgrade:
            admit.require_newer(fresh.version, self.before)
        self._step("proved", **vars(fresh))
        mode, folder = open_mode(self.places, self.bundle), self.places.deltas / fresh.folder
        session = fine_tune.build(mode, delta, folder, self.file, digest)
        self._step("built")
        seen = self._probe(mode, delta, session)
        self._step("probed", probe=seen.to_json())
        after = self.before.committed(fresh, self.bundle.keep)
        state.write(self.places, after)
        self._step("committed", state=after.to_json())
        return Applied(state=after, before=self.before, seen=seen)

    def _digest(self) -> str:
        """Taken before the file is read, so that one that changes meanwhile is noticed."""
        return file_fact(self.file).sha256 if self.file.is_file() else ""

    def _named(self, digest: str, version: int) -> Served:
        """The file's place: a folder that no other apply has used or will use."""
        folder = f"{self.before.sequence + 1:06}-{digest.removeprefix('sha256:')[:12]}"
        return Served(folder=folder, delta=digest, version=version)

    def _probe(self, mode: Mode, delta: Delta, session: Session) -> Seen:
        known = golden.read(self.places.base / golden.FILE)
        base = device_base(self.places, self.bundle, mode, known)
        return probe(session.run, delta, known.inputs, base, self.bundle.dtype)

    def _step(self, event: str, **facts: Any) -> None:
        """Write a step down, and tell it."""
        journal.append(self.places.journal, event, self.before.sequence + 1, **facts)
        done = STEPS.index(event) + 1
        self.progress(Event(stage="apply", done=done, total=len(STEPS), unit="steps"))
