"""Compare an export folder with its base, its delta and its manifest, running nothing."""

from __future__ import annotations

from pathlib import Path

from kilodelta.errors import ProofError
from kilodelta.export.manifest import artefacts
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.manifest.facts import ExportManifest
from kilodelta.progress import Progress, silent
from kilodelta.verify.digests.proof import Proof


def is_export(place: Path) -> bool:
    """Return whether a folder holds an export's manifest."""
    return (place / artefacts.MANIFEST).is_file()


def check_export(
    folder: Path, delta: Path, proof: Proof, *, progress: Progress = silent
) -> ExportManifest:
    """Check that a folder was exported from this base and this file, and is whole.

    Args:
        folder: what `kilodelta export` wrote.
        delta: the `.kd` file.
        proof: what is proved about base and file.
        progress: called as files are read.

    Raises:
        FileError: the manifest is missing or damaged.
        ProofError: the manifest names another base, delta or result; an engine was built from
            another ONNX file; or a file is missing or changed.
    """
    manifest = artefacts.read(folder)
    _same(folder, "base", manifest.base_root, proof.base)
    _same(folder, "delta", manifest.delta.file.sha256, file_fact(delta).sha256)
    _same(folder, "result", manifest.result_root, proof.result)
    _require_own_engines(folder, manifest)
    artefacts.check_files(folder, manifest, progress=progress)
    return manifest


def _same(folder: Path, what: str, actual: str, expected: str) -> None:
    if actual != expected:
        raise ProofError(
            f"{folder} was exported from another {what}: its manifest says {actual}, "
            f"the {what} given is {expected}",
            fix=f"give the {what} that it was made from, or export again",
        )


def _require_own_engines(folder: Path, manifest: ExportManifest) -> None:
    """Check that each engine was built from the ONNX file of its precision, if that was kept."""
    kept = {a.dtype: a.files[0] for a in manifest.artefacts if a.kind == "onnx"}
    for artefact in manifest.artefacts:
        source = kept.get(artefact.dtype)
        engine = artefact.engine
        if engine is not None and source is not None and engine.onnx != source.sha256:
            raise ProofError(
                f"{folder}: {artefact.file} was built from the ONNX file {engine.onnx}, "
                f"but {source.file} is {source.sha256}",
                fix="export again, both files in one go",
            )
