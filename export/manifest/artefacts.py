"""What an export made: `manifest.json`, which lies beside the artefacts and says what they are.

Reading it needs neither torch nor onnx, so a device can check what it received.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kilodelta.errors import FileError, ProofError
from kilodelta.export.manifest.facts import POINTS
from kilodelta.export.manifest.facts import Artefact as Artefact
from kilodelta.export.manifest.facts import DeltaFacts as DeltaFacts
from kilodelta.export.manifest.facts import EngineFacts as EngineFacts
from kilodelta.export.manifest.facts import ExportManifest as ExportManifest
from kilodelta.export.manifest.facts import FileFact as FileFact
from kilodelta.export.manifest.facts import Port as Port
from kilodelta.export.manifest.facts import Profile as Profile
from kilodelta.export.manifest.facts import Shape as Shape
from kilodelta.export.manifest.parse import LIMIT, VERSION, parse
from kilodelta.export.manifest.parse import MANIFEST as MANIFEST
from kilodelta.files import canonical, plain, staging
from kilodelta.files.untrusted import FieldError
from kilodelta.progress import Event, Progress, silent

_CHUNK = 16 << 20


def to_json(manifest: ExportManifest) -> dict[str, Any]:
    """Return the manifest as plain JSON values."""
    return {
        "version": VERSION,
        "tool": manifest.tool,
        "libraries": dict(manifest.libraries),
        "base": {"name": manifest.base_name, "root": manifest.base_root},
        "delta": {**asdict(manifest.delta.file), "method": dict(manifest.delta.method)},
        "result": {"root": manifest.result_root},
        "extras": list(manifest.extras),
        "model": manifest.model,
        "artefacts": [_artefact_json(artefact) for artefact in manifest.artefacts],
    }


def _artefact_json(artefact: Artefact) -> dict[str, Any]:
    return {
        "kind": artefact.kind,
        "dtype": artefact.dtype,
        "files": [asdict(file) for file in artefact.files],
        "inputs": [asdict(port) for port in artefact.inputs],
        "outputs": [asdict(port) for port in artefact.outputs],
        "profile": {
            name: dict(zip(POINTS, shapes, strict=True))
            for name, shapes in artefact.profile.items()
        },
        "engine": None if artefact.engine is None else asdict(artefact.engine),
    }


def write(manifest: ExportManifest, folder: Path) -> Path:
    """Write `manifest.json` into a folder, in full or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    text = json.dumps(to_json(manifest), indent=1, ensure_ascii=False, allow_nan=False)
    staging.write(folder / MANIFEST, text.encode("utf-8") + b"\n")
    return folder / MANIFEST


def read(folder: Path) -> ExportManifest:
    """Read `manifest.json` from a folder, trusting nothing.

    Raises:
        FileError: it is missing, or a field of it is wrong; the message names the field.
    """
    place = folder / MANIFEST
    try:
        data = plain.read(place, LIMIT)
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
    """Read a regular file for its name, digest and bytes.

    Args:
        path: the file.
        follow: whether it may be a link.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    state, count = hashlib.sha256(), 0
    with plain.open_reader(path, follow=follow) as file:
        while part := file.read(_CHUNK):
            state.update(part)
            count += len(part)
    return FileFact(file=path.name, sha256=f"sha256:{state.hexdigest()}", nbytes=count)


def check_files(folder: Path, manifest: ExportManifest, *, progress: Progress = silent) -> None:
    """See that every file of every artefact is there, byte for byte.

    Raises:
        ProofError: naming every file that is missing or changed, with both values.
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
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    if actual.sha256 != expected.sha256:
        return f"{path.name} is {actual.sha256}, not {expected.sha256}"
    return ""
