"""Describe the artefacts of one fine-tune: what they were made of, and by which libraries."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from kilodelta import __version__
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.manifest.facts import Artefact, DeltaFacts, ExportManifest
from kilodelta.format.delta import Delta

_LIBRARIES = ("torch", "transformers", "onnxscript", "onnx-ir", "numpy", "safetensors")


def export_manifest(
    delta: Delta, path: Path, model: str | None, made: Sequence[Artefact]
) -> ExportManifest:
    """Return the manifest of artefacts of one fine-tune, made by this tool and its libraries.

    Args:
        delta: the fine-tune.
        path: its file.
        model: `package.module:function` that built the module.
        made: the artefacts.
    """
    facts = delta.manifest
    return ExportManifest(
        tool=f"kilodelta {__version__}",
        libraries=MappingProxyType(_versions()),
        base_name=facts.base.name,
        base_root=facts.base.root,
        delta=DeltaFacts(file=file_fact(path), method=MappingProxyType(facts.method.to_manifest())),
        result_root=facts.result,
        extras=tuple(delta.extras),
        model=model,
        artefacts=tuple(made),
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
