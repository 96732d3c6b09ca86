"""Lay an export's folder out as a model repository of Triton Inference Server.

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
from kilodelta.export.manifest.facts import Artefact
from kilodelta.export.options import short
from kilodelta.export.tensorrt.flavour import RTX
from kilodelta.export.triton.config import MODEL_FILES, config
from kilodelta.files import staging

CONFIG = "config.pbtxt"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")


@dataclass(frozen=True, kw_only=True)
class TritonModel:
    """One model of the repository: its name, the version written, the file it came from."""

    name: str
    version: int
    file: str


@dataclass(frozen=True, kw_only=True)
class Repository:
    """What was written; `left_out` says which files Triton cannot run, and why."""

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

    Example:
        >>> write_repository("out/", "models/").models  # doctest: +SKIP
        (TritonModel(name='task', version=1, file='model.fp32.onnx'),)
    """
    source, place = Path(folder), Path(repository)
    manifest = artefacts.read(source)
    artefacts.check_files(source, manifest)
    refused = {a.file: _refusal(_runtime(a), a.dtype) for a in manifest.artefacts}
    chosen = [artefact for artefact in manifest.artefacts if not refused[artefact.file]]
    left_out = tuple(f"{file}: {reason}" for file, reason in refused.items() if reason)
    if not chosen:
        raise _nothing_to_serve(f"{source} holds nothing that Triton runs", left_out)
    stem = _checked(name or Path(manifest.delta.file.file).stem)
    place.mkdir(parents=True, exist_ok=True)
    models = tuple(_add(source, place / model, of) for model, of in _named(stem, chosen))
    return Repository(path=place, models=models, left_out=left_out)


def require_servable(
    file: str | os.PathLike[str], *, kinds: Sequence[str], dtypes: Sequence[str]
) -> None:
    """Refuse before an export what `write_repository` would refuse after it.

    Args:
        file: the `.kd` file, whose name becomes the model's.
        kinds: what the export will hold: "onnx", and the TensorRT that builds its engines.
        dtypes: its precisions.

    Raises:
        ExportError: Triton could run none of the artefacts.
        InputError: the file's name is none for a model.

    Example:
        >>> require_servable("task.kd", kinds=["onnx"], dtypes=["float16"])
    """
    _checked(Path(file).stem)
    reasons = [_refusal(kind, dtype) for kind in kinds for dtype in dtypes]
    if all(reasons):
        raise _nothing_to_serve("this export would hold nothing that Triton runs", reasons)


def _runtime(artefact: Artefact) -> str:
    return "onnx" if artefact.engine is None else artefact.engine.flavour


def _refusal(runtime: str, dtype: str) -> str:
    """Why Triton runs no such artefact; empty where it does."""
    if runtime == RTX:
        return "Triton does not run TensorRT-RTX engines"
    if runtime == "onnx" and dtype == "bfloat16":
        return "Triton's ONNX Runtime back end takes no bfloat16"
    return ""


def _nothing_to_serve(what: str, reasons: Sequence[str]) -> ExportError:
    return ExportError(
        f"{what}: {'; '.join(dict.fromkeys(reasons))}",
        fix="export with --onnx and --dtype fp32 or fp16, or with --flavour tensorrt",
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
    text, place = config(model.name, artefact).encode("utf-8"), model / CONFIG
    if place.exists() and place.read_bytes() != text:
        raise OutputError(
            f"{place} describes another model than {artefact.file} is",
            fix="give another name; or, if you edited it, copy the files of the export yourself",
        )
    version = 1 + max((int(place.name) for place in _versions(model)), default=0)
    model.mkdir(exist_ok=True)
    if not place.exists():
        staging.write(place, text)
    with staging.new_folder(model / str(version)) as stage:
        for index, file in enumerate(artefact.files):
            own = MODEL_FILES[artefact.kind] if index == 0 else file.file
            shutil.copyfile(source / file.file, stage / own)
    return TritonModel(name=model.name, version=version, file=artefact.file)


def _versions(model: Path) -> list[Path]:
    """List the numbered folders, which are all that Triton looks at."""
    places = model.iterdir() if model.is_dir() else ()
    return [place for place in places if place.name.isdecimal() and place.is_dir()]
