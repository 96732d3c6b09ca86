"""An export's folder: write and read its `manifest.json`, and check its files byte for byte.

Neither torch nor onnx is needed, so a device can check what it received.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from kilodelta.errors import FileError, ProofError
from kilodelta.export.manifest.facts import ExportManifest, FileFact
from kilodelta.export.manifest.json_text import MANIFEST as MANIFEST
from kilodelta.export.manifest.json_text import parse, to_text
from kilodelta.export.manifest.json_text import to_json as to_json
from kilodelta.files import canonical, plain, staging
from kilodelta.files.untrusted import FieldError
from kilodelta.progress import Event, Progress, silent

LIMIT = 16 << 20
"""Bytes of a manifest that are read at most."""

_CHUNK = 16 << 20


def write(manifest: ExportManifest, folder: Path) -> Path:
    """Write `manifest.json` into a folder, in full or not at all, and return its path.

    Raises:
        OutputError: it cannot be written.
    """
    staging.write(folder / MANIFEST, to_text(manifest))
    return folder / MANIFEST


def read(folder: Path) -> ExportManifest:
    """Read `manifest.json` from a folder, trusting nothing.

    Raises:
        FileError: it is missing, no regular file or too large, or a field of it is wrong; the
            message names the field.
    """
    place = folder / MANIFEST
    try:
        data = plain.read(place, LIMIT)
    except plain.NotPlainError as error:
        raise FileError(
            f"{place} {error.strerror}", fix="export again, or fetch the folder again"
        ) from None
    except OSError as error:
        raise FileError(
            f"{place} cannot be read: {error.strerror or error}",
            fix="give a folder that `kilodelta export` has written",
        ) from None
    try:
        return parse(data)
    except (FieldError, canonical.NotCanonicalError) as error:
        raise FileError(
            f"{place} is wrong: {error}", fix="export again, or fetch the folder again"
        ) from None


def file_fact(path: Path, *, follow: bool = True) -> FileFact:
    """Read a regular file and return its name, digest and number of bytes.

    Args:
        path: the file.
        follow: whether it may be a link, as one that the user named may.

    Raises:
        OSError: it cannot be read, or is no regular file.

    Example:
        >>> file_fact(Path("tests/golden/0.1.0/base.safetensors")).nbytes
        1464
    """
    state, count = hashlib.sha256(), 0
    with plain.open_reader(path, follow=follow) as file:
        while part := file.read(_CHUNK):
            state.update(part)
            count += len(part)
    return FileFact(file=path.name, sha256=f"sha256:{state.hexdigest()}", nbytes=count)


def check_files(folder: Path, manifest: ExportManifest, *, progress: Progress = silent) -> None:
    """See that every file of every artefact is present, byte for byte.

    Args:
        folder: what an export wrote.
        manifest: what `read` found there.
        progress: called after each file.

    Raises:
        ProofError: naming every file that is missing, no regular file, or changed, with both
            values.
    """
    files = [file for artefact in manifest.artefacts for file in artefact.files]
    wrong = []
    for index, file in enumerate(files, 1):
        if difference := _difference(folder / file.file, file):
            wrong.append(difference)
        progress(Event(stage="hash", done=index, total=len(files), unit="files"))
    if wrong:
        raise ProofError(
            f"{folder}: {'; '.join(wrong)}", fix="export again, or fetch the folder again"
        )


def _difference(path: Path, expected: FileFact) -> str:
    try:
        size = path.lstat().st_size
        if plain.is_file(path) and size != expected.nbytes:
            return f"{path.name} has {size} bytes, not {expected.nbytes}"
        actual = file_fact(path, follow=False)
    except plain.NotPlainError as error:
        return f"{path.name} {error.strerror}"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    if actual.sha256 != expected.sha256:
        return f"{path.name} is {actual.sha256}, not {expected.sha256}"
    return ""
