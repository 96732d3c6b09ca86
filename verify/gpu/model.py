"""Make the model that a GPU's proof exports, and two fine-tunes of it, all random."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kilodelta.errors import require
from kilodelta.export.manifest.facts import Profile
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.methods import Nola
from kilodelta.format.targets import Patterns
from kilodelta.models.quiet import quiet
from kilodelta.progress import silent
from kilodelta.verify.gpu import synthetic
from kilodelta.verify.options import Subject, VerifyOptions
from kilodelta.verify.parity.cases import cases
from kilodelta.verify.parity.models import ModelPair, open_pair
from kilodelta.verify.parity.reference import Reference
from kilodelta.verify.runners.runner import Arrays

LAYERS = Patterns(include=("*layer.*.weight",), exclude=("*LayerNorm*",))
RANK = 4


@dataclass(frozen=True, kw_only=True)
class Models:
    """A base folder, two `.kd` files for it, and inputs in an `.npz` file."""

    base: Path
    deltas: tuple[Path, Path]
    inputs: Path

    @property
    def batch(self) -> Arrays:
        """Read the inputs by name."""
        with np.load(self.inputs) as arrays:
            return dict(arrays)

    def reference(
        self, fine_tune: int, profile: Profile, outputs: tuple[str, ...], device: str
    ) -> Reference:
        """Compute what artefacts of a fine-tune are held against.

        Args:
            fine_tune: 0 or 1.
            profile: by input its smallest, usual and largest shape.
            outputs: names of the outputs to compare.
            device: where torch computes, "cpu" or "cuda".
        """
        pair = self.pair(fine_tune)
        return Reference(
            pair.merged.view(),
            pair.base.view(),
            outputs=outputs,
            cases=cases(self.batch, profile),
            device=device,
        )

    def pair(self, fine_tune: int) -> ModelPair:
        """Open a merged fine-tune, and the base."""
        subject = Subject(base=Checkpoint.open(self.base), delta=self.deltas[fine_tune])
        return open_pair(subject, VerifyOptions(), silent)


def make(folder: Path, *, small: bool) -> Models:
    """Make an encoder of MiniLM's shape, or a pico one; vocabulary and inputs are small.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    base, deltas = _encoder(folder / "base", small=small), (folder / "a.kd", folder / "b.kd")
    for number, path in enumerate(deltas, 1):
        method = Nola(rank=RANK, bases=64)
        synthetic.delta(base / "model.safetensors", method, LAYERS, fine_tune=number).save(path)
    return Models(base=base, deltas=deltas, inputs=_inputs(folder / "inputs.npz"))


def _encoder(folder: Path, *, small: bool) -> Path:
    """Save a random BERT as a Hugging Face folder."""
    transformers = require("transformers", extra="hf", why="build a model to export")
    torch.manual_seed(0)
    layers, width, heads, positions = (2, 16, 2, 32) if small else (6, 384, 12, 128)
    config = transformers.BertConfig(
        vocab_size=48,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width if small else 4 * width,
        max_position_embeddings=positions,
        architectures=["BertModel"],
    )
    model = transformers.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if small else 0.1)
    with quiet():
        model.save_pretrained(folder)
    return folder


def _inputs(path: Path) -> Path:
    rng = np.random.default_rng(0)
    mask = (np.arange(12) < rng.integers(3, 13, (8, 1))).astype(np.int64)
    np.savez(path, input_ids=rng.integers(1, 48, (8, 12)) * mask, attention_mask=mask)
    return path
