"""Change a device folder: one process at a time, one rename, and a way back from every error.

The kernel holds the lock (flock) and drops it when its process ends, however it ends; so a killed
command never leaves a stale lock. What it did leave is removed before the next change begins.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.folder.journal import SETTLED, Entry, last_state
from kilodelta.device.folder.state import State, read_state, write_state
from kilodelta.errors import DeviceError, KiloDeltaError, LockedError, OutputError
from kilodelta.files import plain, staging
from kilodelta.files.system import try_lock

_OLD_STAGE = re.compile(r"\.(current|journal|baseline\.npz)\.[0-9]+\.tmp\Z")
"""Stages of version 0.1, which a killed command left behind."""


@dataclass(frozen=True, kw_only=True)
class FolderChange:
    """A change under way, which ends in `commit` or in an error.

    Attributes:
        folder: the folder; this process holds its lock.
        before: the state that stands.
    """

    folder: DeviceFolder
    before: State

    @property
    def sequence(self) -> int:
        """The number of this step."""
        return self.before.sequence + 1

    def note(self, event: str, **facts: Any) -> None:
        """Write a step down.

        Raises:
            OutputError: the journal cannot be written.
        """
        self.folder.journal.append(event, self.sequence, **facts)

    def commit(self, after: State, event: str) -> tuple[str, ...]:
        """Make `after` the state that stands, by one rename.

        Returns:
            What went wrong after the rename, which no longer changes what is served.

        Raises:
            OutputError: it cannot be written; the state before stands.
        """
        warnings = []
        try:
            write_state(self.folder.current, after)
        except OutputError as problem:
            # The rename may have come off, and only the folder's fsync have failed.
            if not self._stands(after):
                raise
            warnings.append(f"it is served, but may be lost with the power: {problem.what}")
        try:
            self.note(event, state=after.to_json())
        except OutputError as problem:
            warnings.append(f"it is served, but not written down: {problem.what}")
        return tuple(warnings)

    def _stands(self, after: State) -> bool:
        with contextlib.suppress(DeviceError):
            return read_state(self.folder.current) == after
        return False


@contextlib.contextmanager
def changing(folder: DeviceFolder) -> Iterator[FolderChange]:
    """Lock a folder, repair what a killed command left, and yield the change to make.

    If the block raises, what was built and is not served is removed, and the error is written down.

    Raises:
        LockedError: another process is changing the folder.
        DeviceError: neither `current` nor the journal can be read.
        OutputError: the folder cannot be written.
    """
    with locked(folder):
        change = FolderChange(folder=folder, before=recover(folder))
        try:
            yield change
        except BaseException as problem:
            with contextlib.suppress(KiloDeltaError, OSError):
                _undo(change, problem)
            raise


def _undo(change: FolderChange, problem: BaseException) -> None:
    standing = read_state(change.folder.current)
    sweep(change.folder, standing)
    # An interrupt may come between the rename and its line in the journal.
    event = "committed" if standing.sequence == change.sequence else "failed"
    why = getattr(problem, "what", type(problem).__name__)
    change.note(event, why=why, state=standing.to_json())


def recover(folder: DeviceFolder) -> State:
    """Repair the folder after a crash and return the state that stands. Call with the lock held.

    Raises:
        DeviceError: neither `current` nor the journal can be read.
        OutputError: the folder cannot be written.
    """
    journal = folder.journal
    journal.repair()
    entries = journal.entries()
    standing = _standing(folder.current, entries)
    removed = sweep(folder, standing)
    if entries and entries[-1]["event"] not in SETTLED:
        journal.append("recovered", standing.sequence, removed=removed, state=standing.to_json())
    return standing


def _standing(current: Path, entries: list[Entry]) -> State:
    """`current`; where it is lost, the journal's newest state, written anew."""
    try:
        return read_state(current)
    except DeviceError as problem:
        newest = last_state(entries)
        if newest is None:
            raise DeviceError(
                problem.what, fix="the journal is lost too: copy the bundle to the device again"
            ) from None
    write_state(current, newest)
    return newest


def sweep(folder: DeviceFolder, standing: State) -> list[str]:
    """Remove what a state does not name, and return the names that were removed.

    That is stages of killed commands, fine-tunes that never came to be served, and those that are
    too old to go back to.
    """
    removed = staging.sweep(folder.root)
    away = [path for path in folder.root.iterdir() if _OLD_STAGE.match(path.name)]
    away += [path for path in folder.deltas.iterdir() if path.name not in standing.names()]
    return removed + [path.name for path in away if _remove(path)]


def _remove(path: Path) -> bool:
    if plain.is_folder(path):
        shutil.rmtree(path, ignore_errors=True)  # follows no links
    else:
        path.unlink(missing_ok=True)
    return not os.path.lexists(path)


@contextlib.contextmanager
def locked(folder: DeviceFolder) -> Iterator[None]:
    """Hold the folder's lock, or fail at once.

    Raises:
        LockedError: another process holds it.
        OutputError: the folder cannot be written.
    """
    path = folder.lock
    try:
        descriptor = plain.open_file(path, os.O_RDONLY | os.O_CREAT)
    except OSError as problem:
        raise OutputError(
            f"{path} cannot be written: {problem.strerror}",
            fix="check the folder's permissions, and that `lock` is a file",
        ) from None
    try:
        held = try_lock(descriptor)
        if held is None:
            raise OutputError(
                f"{path} cannot be locked: this system or file system has no locks",
                fix="put the device folder on a local file system",
            )
        if not held:
            raise _held(path)
        _sign(path)
        yield
    finally:
        os.close(descriptor)


def _held(path: Path) -> LockedError:
    try:
        holder = plain.read(path, 200).decode(errors="replace").strip()
    except OSError:
        holder = ""
    return LockedError(
        f"{path.parent} is being changed by {holder or 'another process'}",
        fix="wait until it has finished, and try again",
    )


def _sign(path: Path) -> None:
    """Say in the file who holds it, for messages; where that fails, nobody is the worse for it."""
    text = f"process {os.getpid()} since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n"
    with contextlib.suppress(OSError):
        # With a second name, as `cp -al` makes, the text would be written into another folder.
        if path.lstat().st_nlink == 1:
            descriptor = plain.open_file(path, os.O_WRONLY | os.O_TRUNC)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode())
