"""`release --pedigree`: what a release descends from, as a CycloneDX bill of materials.

Source: CycloneDX 1.6, https://cyclonedx.org/docs/1.6/json/: a component of the type
`machine-learning-model` whose `pedigree` names its ancestors. The release is the component and its
base model the one ancestor. Roots of models are no hashes of a file, so they are properties;
`hashes` holds the digest of the `.kd` file alone. There is no time and no random serial number:
equal releases have equal bills.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta import __version__
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.format.manifest import Manifest

SUFFIX = ".cdx.json"
UNNAMED = "base"
"""What an ancestor is called whose name the file does not say."""


def pedigree_path(file: Path) -> Path:
    """Return where the bill of materials of a `.kd` file lies.

    Example:
        >>> pedigree_path(Path("task-7.kd"))
        PosixPath('task-7.kd.cdx.json')
    """
    return file.with_name(file.name + SUFFIX)


def pedigree(file: Path, manifest: Manifest, version: int, task: str) -> bytes:
    """Describe a release that was written.

    Args:
        file: the `.kd` file, which is read for its digest.
        manifest: what it says about itself.
        version: its version.
        task: what it is for; empty where that is not stated.

    Returns:
        CycloneDX 1.6 as JSON.
    """
    digest = file_fact(file).sha256
    ref, base = f"kilodelta:file:{digest}", manifest.base
    facts = {
        "method": manifest.method.name,
        "task": task,
        "result": manifest.result,
        "beside": manifest.beside,
    }
    component = {
        "type": "machine-learning-model",
        "bom-ref": ref,
        "name": file.name,
        "version": str(version),
        "hashes": [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}],
        "pedigree": {
            "ancestors": [_ancestor(manifest)],
            "notes": f"merged into {base.root} it gives {manifest.result}",
        },
        "properties": _properties(facts),
    }
    tool = {"type": "application", "name": "kilodelta", "version": __version__}
    bill = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, ref)}",
        "version": 1,
        "metadata": {"tools": {"components": [tool]}, "component": component},
    }
    return json.dumps(bill, indent=1).encode("ascii") + b"\n"


def _ancestor(manifest: Manifest) -> dict[str, Any]:
    base, grid = manifest.base, manifest.grid
    facts = {"root": base.root, "tensors": str(base.tensors)}
    if grid is not None:
        facts |= {"logical": grid.logical, "quantisation": ", ".join(grid.kinds)}
    return {
        "type": "machine-learning-model",
        "bom-ref": f"kilodelta:model:{base.root}",
        "name": base.name or UNNAMED,
        "properties": _properties(facts),
    }


def _properties(facts: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"kilodelta:{name}", "value": value} for name, value in facts.items() if value]
