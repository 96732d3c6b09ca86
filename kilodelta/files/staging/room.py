"""Ask the disks for room, and for the right to write, before a long work begins that fills them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kilodelta.errors import OutputError
from kilodelta.files.staging.stage import is_stage
from kilodelta.sizes import byte_label


@dataclass(frozen=True, kw_only=True)
class Need:
    """What is to be written to one place.

    Attributes:
        path: the file or folder; it need not exist.
        nbytes: that it takes; nothing is asked of a place that needs none.
        what: its name in a message, such as "the merged weights".
    """

    path: Path
    nbytes: int
    what: str


def require_room(*needs: Need, fix: str = "") -> None:
    """Check that all of these can be written, and that those on one disk fit onto it together.

    Nothing is written. Free space is what the system gives to this user: quotas are not known, nor
    what other programs will write meanwhile.

    Args:
        needs: places, each with its bytes.
        fix: what to change, besides freeing space; by default another place for the output.

    Raises:
        OutputError: a folder cannot be written to, or a disk has less than is needed; both numbers
            are said.

    Example:
        >>> require_room(Need(path=Path("task.kd"), nbytes=12_000, what="the file"))
        >>> try:
        ...     require_room(Need(path=Path("task.kd"), nbytes=10**18, what="the file"))
        ... except OutputError as problem:
        ...     problem.what.split(",")[0]
        '1e+09 GB are needed for the file'
    """
    disks: dict[int, list[Need]] = {}
    for need in needs:
        if need.nbytes > 0:
            place = _present(need.path)
            _require_writable(place, need, fix)
            disks.setdefault(os.stat(place).st_dev, []).append(need)
    for own in disks.values():
        place = _present(own[0].path)
        free = shutil.disk_usage(place).free
        needed = sum(need.nbytes for need in own)
        if needed > free:
            asked, left = _told_apart(needed, free)
            raise OutputError(
                f"{asked} are needed for {_listed(own)}, and {_named(place)} has {left} free",
                fix=_fix(fix, place),
            )


def _require_writable(place: Path, need: Need, fix: str) -> None:
    """Check that a folder takes one more file."""
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OutputError(
            f"{_named(place)} cannot be written to, and {need.what} would lie there",
            fix=_fix(fix, place),
        )
    if hasattr(os, "statvfs"):
        status = os.statvfs(place)
        if status.f_files and not status.f_favail:  # some systems number no files
            raise OutputError(
                f"{_named(place)} takes no further file: its disk has no free inode",
                fix=_fix(fix, place),
            )


def _present(path: Path) -> Path:
    """Return the folder that a new path would be made in: the nearest that is there."""
    return next(p for p in path.absolute().parents if p.exists())


def _named(place: Path) -> Path:
    """Name a folder inside a stage by the one that the stage lies in, which stays."""
    outer = [p for p in (place, *place.parents) if is_stage(p)]
    return outer[-1].parent if outer else place


def _listed(needs: Iterable[Need]) -> str:
    """Name what is needed, each thing with its bytes where there are several."""
    own = list(needs)
    if len(own) == 1:
        return own[0].what
    return ", ".join(f"{need.what} ({byte_label(need.nbytes)})" for need in own)


def _told_apart(needed: int, free: int) -> tuple[str, str]:
    """Write two numbers of bytes, so that they read as different."""
    labels = byte_label(needed), byte_label(free)
    return labels if labels[0] != labels[1] else (f"{needed:,} bytes", f"{free:,} bytes")


def _fix(fix: str, place: Path) -> str:
    """Say what to change; a temporary place is changed by the environment."""
    if not fix and place.is_relative_to(tempfile.gettempdir()):
        fix = "set TMPDIR to a folder on a larger disk"
    return f"free some space, or {fix or 'give an output on a larger disk that you may write to'}"
