"""Remember tensor digests per file, so that a wrong base of gigabytes is refused at once.

What is remembered is a hint and proves nothing: a file counts as unchanged while its device, inode,
size and times are the same, and writes through a memory map alter none of these. A file that was
touched within the last two seconds is not remembered, because a second write could leave the same
times. The folder must be the user's own; what is in it is read like a stranger's file, and what
is wrong with it means that the digests are computed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from pathlib import Path

from kilodelta.errors import OutputError
from kilodelta.files import canonical, plain, staging, system
from kilodelta.files.checkpoint import Shard

SETTLED_NS = 2_000_000_000
LIMIT = 64 << 20
"""Bytes of a remembered file's digests."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")


def folder() -> Path:
    """Return `$KILODELTA_CACHE`, else `kilodelta/` in the user's cache folder.

    Raises:
        RuntimeError: the user has no home.
    """
    own = os.environ.get("KILODELTA_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kilodelta"


def load(shard: Shard) -> dict[str, str] | None:
    """Return the remembered tensor digests of a file that seems unchanged, or None."""
    with contextlib.suppress(OSError, RuntimeError, canonical.NotCanonicalError):
        place = _file(shard.path)
        if _is_private(place.parent):
            return _digests(canonical.loads(plain.read(place, LIMIT)), shard)
    return None


def store(shard: Shard, tensors: dict[str, str]) -> None:
    """Remember a file's digests, if it was not touched a moment ago and they are not remembered.

    Writing them again would only wait for the disk.
    """
    # mtime and ctime: coarse clocks may give a second write the times of the first.
    if time.time_ns() - max(shard.file.key[3:]) < SETTLED_NS:
        return
    if load(shard) == tensors:
        return
    text = canonical.dumps({"key": shard.file.key, "tensors": tensors}).encode("utf-8")
    with contextlib.suppress(OSError, RuntimeError, OutputError):
        place = _file(shard.path)
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _is_private(place.parent):
            staging.write(place, text)


def _file(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return folder() / "digests" / f"{name}.json"


def _is_private(place: Path) -> bool:
    """Return whether only this user can have put files there."""
    status = os.stat(place, follow_symlinks=False)
    own = system.is_own(status) and not status.st_mode & 0o022
    return own and stat.S_ISDIR(status.st_mode)


def _digests(table: object, shard: Shard) -> dict[str, str] | None:
    """Check what was remembered field by field against the open file."""
    if not isinstance(table, dict) or table.get("key") != list(shard.file.key):
        return None
    tensors = table.get("tensors")
    names = {entry.name for entry in shard.layout.entries}
    if not isinstance(tensors, dict) or set(tensors) != names:
        return None
    if not all(isinstance(text, str) and _DIGEST.match(text) for text in tensors.values()):
        return None
    return tensors
