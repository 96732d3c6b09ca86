"""Choose the names by which a quantised model is read: those of the file that is made for it."""

from __future__ import annotations

from kilodelta.errors import CheckpointError
from kilodelta.format.manifest import Manifest
from kilodelta.format.targets import select
from kilodelta.grid.identity import config_digest
from kilodelta.grid.model import QuantisedModel


def named_for(model: QuantisedModel, manifest: Manifest) -> QuantisedModel:
    """Read a GGUF file by Hugging Face's names where a `.kd` file has these; else change nothing.

    A file for a float model has them, and so has one that was compressed against the GGUF file.

    Args:
        model: the quantised model, of any layout.
        manifest: of the file that is to be applied.
    """
    if model.method != "gguf" or model.renamed:
        return model
    if manifest.grid is not None and manifest.grid.config == config_digest(model.config):
        return model  # made for the names that the GGUF file has
    from kilodelta.grid.gguf.names import by_hugging_face

    try:
        renamed = by_hugging_face(model)
    except CheckpointError:
        return model  # targets that it lacks are named by whoever binds the file
    chosen = select(renamed.infos(), manifest.patterns)
    return renamed if len(chosen) == manifest.count else model
