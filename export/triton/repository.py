"""A Triton Inference Server model repository from an export's folder.

::

    repository/<model>/config.pbtxt
    repository/<model>/<version>/model.onnx   or   model.plan

A further fine-tune of the same shape becomes the model's next version: Triton serves the latest,
and going back is removing a folder. A version appears in full or not at all, so a server that
polls the repository never sees half a model. Neither torch nor onnx is needed here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kilodelta.errors import ExportError, InputError, OutputError
from kilodelta.export.manifest import artefacts
from kilodelta.export.manifest.artefacts import Artefact
from kilodelta.export.options import short
from kilodelta.export.triton.config import MODEL_FILES, config
from kilodelta.files import staging

CONFIG = "config.pbtxt"
_RUN = "tensorrt"
"""The flavour whose engines Triton runs."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")


@dataclass(frozen=True, kw_only=True)
class TritonModel:
    """One model of the repository: its name, the version written, the file it came from."""

    name: str
    version: int
    file: str


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What was written; `left_out` names engines that Triton cannot run."""

    path: Path
    models: tuple[TritonModel, ...]
    left_out: tuple[str, ...]


def write_repository(
    folder: str | os.PathLike[str], repository: str | os.PathLike[str], *, name: str = ""
) -> Repository:
    """Put every artefact of an export into a model repository, as the next version.

    Args:
        folder: what `kilodelta export` wrote; its files are proved against its manifest first.
        repository: a folder, new or with models in it.
        name: of the model; by default the `.kd` file's. Where the export holds several artefacts,
            each is a separate model: `<name>-fp32-onnx`, `<name>-fp16-tensorrt`.

    Raises:
        FileError, ProofError: `folder` is no export, or its files are not what it says.
        ExportError: Triton can run none of the artefacts.
        InputError: the name is none for a model.
        OutputError: the repository's model has other inputs or outputs, or cannot be written.
    """
    source, place = Path(folder), Path(repository)
    manifest = artefacts.read(source)
    artefacts.check_files(source, manifest)
    chosen = [artefact for artefact in manifest.artefacts if _runs(artefact)]
    if not chosen:
        raise _nothing_to_serve(f"{source} holds")
    stem = _checked(name or Path(manifest.delta.file.file).stem)
    place.mkdir(parents=True, exist_ok=True)
    return Repository(
        path=place,
        models=tuple(
            _add(source, place / model, artefact) for model, artefact in _named(stem, chosen)
        ),
        left_out=tuple(a.file for a in manifest.artefacts if not _runs(a)),
    )


def require_servable(file: str | os.PathLike[str], *, flavour: str | None) -> None:
    """Refuse before an export what `write_repository` would refuse after it.

    Args:
        file: the `.kd` file, whose name becomes the model's.
        flavour: of the engines, where the export keeps nothing else; None where it keeps ONNX.

    Raises:
        ExportError: Triton could run none of the artefacts.
        InputError: the file's name is none for a model.
    """
    _checked(Path(file).stem)
    if flavour not in (None, _RUN):
        raise _nothing_to_serve("without --onnx this export holds")


def _runs(artefact: Artefact) -> bool:
    return artefact.engine is None or artefact.engine.flavour == _RUN


def _nothing_to_serve(what: str) -> ExportError:
    return ExportError(
        f"{what} only TensorRT-RTX engines, which Triton does not run",
        fix="export with --onnx, or with --flavour tensorrt",
    )


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise InputError(
            f"{name!r} cannot be a model's name in Triton",
            fix="take letters, digits, dots, dashes and underscores",
        )
    return name


def _named(stem: str, chosen: Sequence[Artefact]) -> list[tuple[str, Artefact]]:
    if len(chosen) == 1:
        return [(stem, chosen[0])]
    return [(f"{stem}-{_short(a)}", a) for a in chosen]


def _short(artefact: Artefact) -> str:
    return f"{short(artefact.dtype)}-{'onnx' if artefact.kind == 'onnx' else 'tensorrt'}"


def _add(source: Path, model: Path, artefact: Artefact) -> TritonModel:
    """Write one model's next version."""
    text = config(model.name, artefact)
    present = model / CONFIG
    if present.exists() and present.read_text(encoding="utf-8") != text:
        raise OutputError(
            f"{present} describes another model than {artefact.file} is",
            fix="give another name; or, if you edited it, copy the files of the export yourself",
        )
    version = 1 + max((int(place.name) for place in _versions(model)), default=0)
    model.mkdir(exist_ok=True)
    if not present.exists():
        staging.write(present, text.encode("utf-8"))
    with staging.new_folder(model / str(version)) as stage:
        for index, file in enumerate(artefact.files):
            own = MODEL_FILES[artefact.kind] if index == 0 else file.file
            shutil.copyfile(source / file.file, stage / own)
    return TritonModel(name=model.name, version=version, file=artefact.file)


def _versions(model: Path) -> list[Path]:
    """List the numbered folders, which are all that Triton looks at."""
    places = model.iterdir() if model.is_dir() else ()
    return [place for place in places if place.name.isdecimal() and place.is_dir()]
