"""The folder that an export writes: new, or an earlier export that may be replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kilodelta.errors import FileError, OutputError
from kilodelta.export.manifest import artefacts
from kilodelta.files import atomic


@contextmanager
def out_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends well and vanishes
    otherwise.

    Args:
        force: replace an earlier export. What else lies in its folder is never removed.

    Raises:
        OutputError: `path` holds something that may not be replaced, or cannot be written.
    """
    if not _is_occupied(path):
        with atomic.new_folder(path) as stage:
            yield stage
        return
    _require_replaceable(path, force=force)
    path = path.resolve()  # a link stays, and what it leads to is replaced
    fresh = path.parent / f".{path.name}.{os.getpid()}.new"
    with atomic.new_folder(fresh) as stage:
        yield stage
    _swap(fresh, path)


def _is_occupied(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _require_replaceable(path: Path, *, force: bool) -> None:
    if not (path / artefacts.MANIFEST).is_file():
        raise OutputError(
            f"{path} exists and is no export of kilodelta", fix="give a new folder as output"
        )
    if not force:
        raise OutputError(
            f"{path} holds an export already", fix="give a new folder, or --force to replace it"
        )
    try:
        known = artefacts.read(path)
    except FileError as error:
        raise OutputError(error.what, fix="give a new folder as output") from None
    own = {file.file for artefact in known.artefacts for file in artefact.files}
    foreign = sorted({place.name for place in path.iterdir()} - own - {artefacts.MANIFEST})
    if foreign:
        raise OutputError(
            f"{path} holds {', '.join(foreign[:5])} too, which no export wrote",
            fix="move that away, or give a new folder as output",
        )


def _swap(fresh: Path, path: Path) -> None:
    """Put `fresh` in the place of `path`, which stays if that fails."""
    old = atomic.temporary(path)
    try:
        os.replace(path, old)
        try:
            os.replace(fresh, path)
        except BaseException:
            os.replace(old, path)
            raise
    except OSError as error:
        raise OutputError(
            f"{path} cannot be replaced: {error.strerror or error}",
            fix="check the folder above and its permissions",
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
