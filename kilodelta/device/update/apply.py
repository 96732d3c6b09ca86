"""`kilodelta apply`: prove, build beside the old, probe, and commit by one rename; or roll back.

Nothing that is served is touched before the rename, and everything it will serve lies on the disk
by then. So a process killed at any point, or a full disk, leaves the old state or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.device.folder.change import FolderChange, changing
from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.folder.fine_tune import build_fine_tune
from kilodelta.device.folder.state import Served, State
from kilodelta.device.golden import golden
from kilodelta.device.golden.base_outputs import device_base
from kilodelta.device.golden.probe import Seen, probe
from kilodelta.device.modes import Mode, open_mode
from kilodelta.device.update import admit
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.models.hub import locate_delta
from kilodelta.progress import Event, Progress, silent
from kilodelta.rehearsal import begin_work, is_dry_run

STEPS = ("proved", "built", "probed", "committed")


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What an `apply` did.

    Attributes:
        state: what is served now.
        before: what was served.
        seen: what the probe saw.
        result: the digest of the merged weights, as the file states it; of the updates where they
            stay beside a quantised base.
        result_proved: whether the device proved it. In adapter mode weights are never merged.
        signed_by: ids of the pinned keys that signed the release; empty on a device that takes
            unsigned ones.
        warnings: what went wrong after the commit, which stands.
    """

    state: State
    before: State
    seen: Seen
    result: str
    result_proved: bool
    signed_by: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "serving": self.state.serving.to_json(),
            "before": self.before.serving.to_json(),
            "sequence": self.state.sequence,
            "probe": self.seen.to_json(),
            "result": {"root": self.result, "proved": self.result_proved},
            "signed_by": list(self.signed_by),
            "warnings": list(self.warnings),
        }


def apply(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    allow_downgrade: bool = False,
    allow_jump: bool = False,
    max_work: float | None = None,
    progress: Progress = silent,
) -> Applied:
    """Serve another fine-tune from a device folder: prove, build, probe, commit.

    On any error what was served before goes on being served. What goes wrong after the commit is
    a warning.

    Args:
        folder: the device folder.
        file: the `.kd` file, or `hf:org/name[/FILE.kd]`.
        allow_downgrade: take a file whose version is lower than the highest this device has had.
        allow_jump: take one whose version is further above it than the bundle allows.
        max_work: the most operations that the file may ask for; by default the bundle's limit.
        progress: called after each step.

    Raises:
        DeviceError: no device folder, or a damaged one.
        LockedError: another command is changing it.
        FileError, BaseMismatchError, InputError: the file is damaged, asks for more work than
            allowed, is for another base, or of a kind that this folder's mode cannot take.
        DowngradeError: its version is too low, or too far ahead.
        SignatureError: the device pins keys, and the release is not signed by enough of them, is
            for another task or kind, or has expired.
        ProofError: the probe failed, or could not have failed.
        OutputError: the disk is full or not writable.

    Example:
        >>> apply("device/", "task-7.kd").state.serving.version  # doctest: +SKIP
        7
    """
    device, place = DeviceFolder.open(folder), locate_delta(file)
    limits = max_work, allow_downgrade, allow_jump
    if is_dry_run():  # without the lock, which writes
        candidate = _admitted(FolderChange(folder=device, before=device.state), place, *limits)
        begin_work(device.root, **_rehearsed(device, candidate))
    with changing(device) as change:
        tell = _teller(progress)
        candidate = _admitted(change, place, *limits)
        served, delta = candidate.served, candidate.delta
        change.note("proved", **served.to_json(), signed_by=list(candidate.signed.keys))
        tell("proved")
        mode = open_mode(change.folder)
        session = build_fine_tune(
            change.folder.deltas / served.folder,
            candidate.file,
            served.delta,
            fill=lambda stage: mode.build(delta, stage),
            open_=mode.open,
        )
        change.note("built")
        tell("built")
        seen = _probe(change.folder, mode, delta, session)
        change.note("probed", probe=seen.to_json())
        tell("probed")
        signed = candidate.signed
        after = change.before.committed(served, change.folder.bundle.keep, signed.seen)
        notes = (signed.note,) if signed.note else ()
        warnings = (*notes, *change.commit(after, "committed"))
    tell("committed")
    return Applied(
        state=after,
        before=change.before,
        seen=seen,
        result=_result(delta, change.folder.bundle.mode),
        result_proved=mode.proves_result,
        signed_by=signed.keys,
        warnings=warnings,
    )


def _result(delta: Delta, mode: str) -> str:
    is_beside = golden.way_of(delta, mode) == golden.BESIDE
    return delta.manifest.beside if is_beside else delta.manifest.result


def _teller(progress: Progress) -> Callable[[str], None]:
    def tell(step: str) -> None:
        done = STEPS.index(step) + 1
        progress(Event(stage="apply", done=done, total=len(STEPS), unit="steps"))

    return tell


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A file that was admitted, and the place it will have."""

    file: Path
    delta: Delta
    served: Served
    signed: admit.Signed


def _rehearsed(device: DeviceFolder, candidate: _Candidate) -> dict[str, object]:
    """Say what would be served in place of what; building and probing are not rehearsed."""
    return {
        "version": f"{candidate.served.version}, in place of {device.state.serving.version}",
        "mode": device.bundle.mode,
        "signed by": ", ".join(candidate.signed.keys) or "nobody asked for: unsigned",
    }


def _admitted(
    change: FolderChange,
    file: Path,
    max_work: float | None,
    allow_downgrade: bool,
    allow_jump: bool,
) -> _Candidate:
    folder = change.folder
    # Taken before the file is read, so that one that changes meanwhile is noticed.
    digest = _digest(file)
    # The signature before the parser: nothing of a file that nobody vouches for is read.
    statement = admit.verified(folder, file, change.before)
    given = load(file, max_work=max_work)
    version = admit.version_of(given)
    signed = admit.require_covered(statement, given, digest, version)
    delta = admit.bind(folder, given)
    admit.require_version(
        version,
        change.before,
        folder.bundle,
        allow_downgrade=allow_downgrade,
        allow_jump=allow_jump,
    )
    admit.require_strict(delta, folder.bundle)
    way = golden.way_of(delta, folder.bundle.mode)
    admit.require_modest_probe(delta, golden.read(folder.base / golden.FILE), way)
    # The sequence in the name: no other apply has used this folder, or will.
    name = f"{change.sequence:06}-{digest.removeprefix('sha256:')[:12]}"
    served = Served(folder=name, delta=digest, version=version)
    return _Candidate(file=file, delta=delta, served=served, signed=signed)


def _digest(file: Path) -> str:
    """`sha256:<hex>` of a file; empty where it cannot be read, of which `load` says why."""
    try:
        return file_fact(file).sha256 if file.is_file() else ""
    except OSError:
        return ""


def _probe(folder: DeviceFolder, mode: Mode, delta: Delta, session: Any) -> Seen:
    stored = golden.read(folder.base / golden.FILE)
    base = device_base(folder, mode, stored)
    way = golden.way_of(delta, folder.bundle.mode)
    return probe(session.run, delta, stored.inputs, base, folder.bundle.dtype, way)
