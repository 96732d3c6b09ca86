"""Stage the folder that an export writes: a new one, or an earlier export that may be replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kilodelta.errors import FileError, OutputError
from kilodelta.export.manifest import artefacts
from kilodelta.files import staging


@contextmanager
def out_folder(path: Path, *, force: bool) -> Iterator[Path]:
    """Yield a folder that becomes `path` when the block ends well, and vanishes otherwise.

    Args:
        path: the output.
        force: replace an earlier export. A folder that holds anything else is never touched.

    Raises:
        OutputError: `path` holds something that may not be replaced, or cannot be written.
    """
    require_out(path, force=force)
    with staging.new_folder(path, replace=_is_occupied(path)) as stage:
        yield stage


def require_out(path: Path, *, force: bool) -> None:
    """Check that an export may write a folder: it is free, or with `force` an earlier export.

    Raises:
        OutputError: `path` holds something that may not be replaced.
    """
    if _is_occupied(path):
        _require_replaceable(path, force=force)


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
        manifest = artefacts.read(path)
    except FileError as error:
        raise OutputError(error.what, fix="give a new folder as output") from None
    own = {file.file for artefact in manifest.artefacts for file in artefact.files}
    foreign = sorted({place.name for place in path.iterdir()} - own - {artefacts.MANIFEST})
    if foreign:
        raise OutputError(
            f"{path} also holds {', '.join(foreign[:5])}, which no export wrote",
            fix="move that away, or give a new folder as output",
        )
