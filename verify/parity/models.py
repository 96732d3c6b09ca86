"""The models that a verification runs in torch: merged, base in the same shape, and tuned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from kilodelta.compress.distill.learn.comparisons import SHARPNESS
from kilodelta.errors import InputError
from kilodelta.export.merged_model import merged_weights, open_merged
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.grid.dequantise import float_folder
from kilodelta.grid.open import open_named
from kilodelta.merging.quantised import open_base
from kilodelta.models import LoadedModel, experts, fill, open_model, outputs, read_texts, tokenize
from kilodelta.models.heads import EMBEDDING
from kilodelta.progress import Progress
from kilodelta.verify.options import Subject, VerifyOptions

LABELS = "labels"
"""The name of the class scores that embeddings give over a set of labels."""


@dataclass(frozen=True, kw_only=True)
class ModelPair:
    """The merged model, and the base in the same architecture."""

    merged: LoadedModel
    base: LoadedModel


def open_pair(subject: Subject, options: VerifyOptions, progress: Progress) -> ModelPair:
    """Open both. Tensors that only the delta has (a new head) are the same in both.

    Raises:
        InputError, ExportError: the architecture is unknown, or has no place for such a tensor.
    """
    delta = load(subject.delta, max_work=options.max_work)
    if delta.manifest.grid is not None:
        return _open_quantised_pair(subject, delta, options, progress)
    assert isinstance(subject.base, Checkpoint)  # a float model is no other file
    with _weights(subject, delta, progress) as weights:
        merged = open_merged(
            subject.base, weights, delta, model=options.model, config=options.config
        )
    base = replace(merged, module=copy.deepcopy(merged.module))
    state = base.module.state_dict()
    names = {
        name: place
        for name, place in base.names.items()
        if name in subject.base and subject.base.info(name).shape == tuple(state[place].shape)
    }
    fill(base.module, subject.base, names)
    return ModelPair(merged=merged, base=base)


def _open_quantised_pair(
    subject: Subject, delta: Delta, options: VerifyOptions, progress: Progress
) -> ModelPair:
    """Open both of a quantised base in float64, which holds the exact value of every code.

    Raises:
        InputError, ExportError: as `open_pair`; or the base is an ONNX graph.
    """
    base = open_base(subject.base, delta.manifest)
    with ExitStack() as stack:
        before = stack.enter_context(float_folder(base, dtype="float64"))
        weights = stack.enter_context(_weights(subject, delta, progress))
        after = stack.enter_context(float_folder(open_named(weights), dtype="float64"))
        opened = Checkpoint.open(after)
        merged = open_merged(
            opened,
            after,
            delta,
            model=options.model,
            config=options.config,
            source=subject.place,
        )
        exact = copy.deepcopy(merged.module).double()
        experts.use(exact, experts.EXACT)  # the only way of theirs that is in float64
        fill(exact, opened, merged.names)  # opening has rounded to float32
        unmerged = copy.deepcopy(exact)
        held = set(Checkpoint.open(before).names)
        brought = {name for name in merged.names if name not in held or name in delta.extras}
        fill(unmerged, before, {n: p for n, p in merged.names.items() if n not in brought})
    return ModelPair(merged=replace(merged, module=exact), base=replace(merged, module=unmerged))


@contextmanager
def _weights(subject: Subject, delta: Delta, progress: Progress) -> Iterator[Path]:
    """Yield the merged weights on disk: those given, or a merge that is removed afterwards."""
    if subject.merged is not None:
        yield subject.merged
        return
    with merged_weights(subject.base, delta, min_changed=0, progress=progress) as place:
        yield place


def open_tuned(options: VerifyOptions) -> LoadedModel:
    """Open the tuned model in the architecture that its folder states.

    Raises:
        InputError, CheckpointError: it cannot be opened.
    """
    tuned = str(options.against)
    return open_model(options.model or tuned, weights=tuned if options.model else None)


class Labelled(nn.Module):
    """A view of a model that embeds, with class scores over labels beside the embedding.

    Args:
        view: puts out embeddings (rows, width) under `sentence_embedding`.
        labels: the labels' embeddings, (n, width).
    """

    def __init__(self, view: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.view = view
        self.register_buffer("labels", SHARPNESS * functional.normalize(labels, dim=-1))

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Compute the embedding, and its sharpened cosine to every label, (rows, n)."""
        outputs: dict[str, Tensor] = self.view(**batch)
        unit = functional.normalize(outputs[EMBEDDING], dim=-1)
        return {**outputs, LABELS: unit @ self.get_buffer("labels").T}


def embed_labels(pair: ModelPair, options: VerifyOptions) -> Tensor:
    """Embed the labels by the base model; float32 (n, width).

    Raises:
        InputError: the model embeds no texts, or the labels cannot be read.
    """
    if pair.base.pooling is None:
        raise InputError(
            "labels are compared with sentence embeddings, and this model makes none",
            fix="leave --labels away: class scores are compared as they are",
        )
    with torch.inference_mode():
        texts = read_texts(str(options.labels))
        return outputs(pair.base, tokenize(pair.base, texts))[EMBEDDING].clone()
