"""Digests remembered per file, so that a base of gigabytes is hashed once.

A file counts as unchanged while its device, inode, size, modification and change times are the
same. One that was touched within the last two seconds is not remembered: a second write could
leave the same times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

SETTLED_NS = 2_000_000_000

Key = tuple[int, int, int, int, int]


def folder() -> Path:
    """`$KILODELTA_CACHE`, else `kilodelta/` in the user's cache folder."""
    own = os.environ.get("KILODELTA_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kilodelta"


def key(path: Path) -> Key:
    """What must not change: device, inode, size, modification and change time (ns)."""
    status = path.stat()
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip


def _file(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return folder() / "digests" / f"{name}.json"


def load(path: Path) -> dict[str, str] | None:
    """The tensor digests of an unchanged file, or None."""
    try:
        found = json.loads(_file(path).read_bytes())
        if tuple(found["key"]) == key(path):
            return {str(name): str(text) for name, text in found["tensors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        pass  # no cache, or one that something else wrote: hash again
    return None


def store(path: Path, before: Key, tensors: dict[str, str]) -> None:
    """Remember a file's digests if it did not change while it was hashed."""
    with contextlib.suppress(OSError, RuntimeError):  # the file is gone, or the cache cannot be had
        if key(path) != before or time.time_ns() - max(before[3:]) < SETTLED_NS:
            return
        target = _file(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
            json.dump({"key": before, "tensors": tensors}, file)
        os.replace(file.name, target)
