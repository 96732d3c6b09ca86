"""Make the two graphs of an encoder-decoder, which may hold the same weights (a tied embedding)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kilodelta.errors import ExportError, InputError
from kilodelta.export.manifest.facts import BATCH, DTYPES, PAST_SEQUENCE, Port, Sizes
from kilodelta.export.onnx.named import NamedGraph, named_graph
from kilodelta.export.onnx.template import Template
from kilodelta.export.onnx.trial import can_try, open_graph
from kilodelta.export.seq2seq.trial import try_halves
from kilodelta.models import Batch, LoadedModel
from kilodelta.models.generation.cache import PAST
from kilodelta.models.generation.seq2seq import (
    CROSS,
    DECODER,
    ENCODED,
    ENCODER_MASK,
    DecoderHalf,
    EncoderHalf,
    Seq2Seq,
    empty_cross,
    empty_own,
    measure,
    source_example,
)

ENCODER_SEQUENCE, DECODER_SEQUENCE = "encoder_sequence", "decoder_sequence"
"""Names of axes: what the encoder reads, and the decoder's new tokens."""
ENCODER_FILE, DECODER_FILE = "encoder_model", "decoder_model"
CACHED_FILE = "decoder_with_past_model"
"""What the files' names begin with, as those of Hugging Face's optimum do."""

_LONGEST = 512
"""Tokens that a profile goes up to by default."""
_ROWS, _READ, _NEW, _PAST = 3, 11, 7, 5
"""Sizes to trace with: more than one, and unlike each other, so that none looks constant."""


def half_templates(
    loaded: LoadedModel,
    *,
    cached: bool,
    dtype: str = "float32",
    sizes: Mapping[str, Sizes] | None = None,
) -> dict[str, Template]:
    """Export the architecture of an encoder-decoder as two graphs.

    Args:
        loaded: what to export; its weights' values serve to try the graphs.
        cached: the encoder puts out the keys and values of cross-attention, and the decoder takes
            and returns its cache: one graph for prompts and single steps.
        dtype: the precision of weights, cache and arithmetic.
        sizes: smallest, usual and largest size of `batch`, `encoder_sequence` (of texts),
            `decoder_sequence` and, with a cache, `past_sequence`.

    Returns:
        The encoder's and the decoder's template, by what their files' names begin with.

    Raises:
        ExportError: the model does not run in halves, torch cannot export one, or a graph does not
            compute it at other sizes.
        InputError: an unknown dtype, or sizes that do not fit the model.
        MissingPackageError: onnxscript is not installed.

    Example:
        >>> list(half_templates(open_model("t5/"), cached=False))  # doctest: +SKIP
        ['encoder_model', 'decoder_model']
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype} is no precision to export in", fix=f"give {', '.join(DTYPES)}")
    source = source_example(loaded, rows=_ROWS, tokens=_READ)
    halves = measure(loaded, source)
    chosen = _sizes(loaded, halves, sizes or {}, cached=cached)
    maker = _Maker(loaded, halves, dtype, chosen)
    encoder = maker.graph(source, lambda twin: EncoderHalf(twin, cached=cached))
    shown = _decoder_example(halves, _length(encoder), cached=cached)
    decoder = maker.graph(shown, lambda twin: DecoderHalf(twin, width=halves.width))
    notes = tuple(_notes(source))
    if can_try(dtype):
        sessions = [
            open_graph(graph.model, loaded, graph.weights, getattr(torch, dtype))
            for graph in (encoder, decoder)
        ]
        try_halves(sessions[0], sessions[1], loaded, halves, dtype)
    else:
        untried = f"{dtype} was not run: onnxruntime is not installed, or does not compute in it"
        notes = (*notes, untried)
    name = CACHED_FILE if cached else DECODER_FILE
    return {ENCODER_FILE: maker.template(encoder, notes), name: maker.template(decoder, notes)}


def is_encoder(outputs: tuple[Port, ...]) -> bool:
    """Return whether a graph with these outputs is the encoder of an encoder-decoder."""
    return any(port.name == ENCODED for port in outputs)


def is_decoder(inputs: tuple[Port, ...]) -> bool:
    """Return whether a graph with these inputs is the decoder of an encoder-decoder."""
    return any(p.name in (ENCODED, f"{PAST}.0.{CROSS}.key") for p in inputs)


@dataclass(frozen=True)
class _Maker:
    """Makes the graphs of one model in one precision."""

    loaded: LoadedModel
    halves: Seq2Seq
    dtype: str
    sizes: Mapping[str, Sizes]

    def graph(self, shown: Batch, view: Callable[[nn.Module], nn.Module]) -> NamedGraph:
        """Trace one half.

        Raises:
            ExportError: torch cannot trace it, or fixes an axis that has to vary.
        """
        axes = {name: _axes(name, self.halves) for name in shown}
        made = named_graph(self.loaded, view, shown, axes, self.dtype)
        if made.frozen:
            raise ExportError(
                f"{type(self.loaded.module).__name__} of {self.loaded.source} cannot be exported "
                f"as an encoder and a decoder: its code fixes {', '.join(sorted(made.frozen))}",
                fix="leave --kv-cache out, or give --inputs: the whole model is then one graph",
            )
        return made

    def template(self, graph: NamedGraph, notes: tuple[str, ...]) -> Template:
        """Describe a graph."""
        return graph.template(self.loaded, self.dtype, self.sizes, notes)


def _sizes(
    loaded: LoadedModel, halves: Seq2Seq, given: Mapping[str, Sizes], *, cached: bool
) -> dict[str, Sizes]:
    top = min(loaded.max_length or _LONGEST, _LONGEST)
    wanted: dict[str, Sizes] = {BATCH: (1, 1, 8)}
    if halves.reads_text:
        wanted[ENCODER_SEQUENCE] = 1, min(64, top), top
    wanted[DECODER_SEQUENCE] = 1, min(64, top), top
    if cached:  # a cache of the longest text leaves room for one token more
        wanted[PAST_SEQUENCE] = 0, min(64, top - 1), top - 1
    for name, sizes in given.items():
        if name not in wanted:
            raise InputError(
                f"an encoder and a decoder of {loaded.source} have no axis {name} to size",
                fix=f"give {', '.join(wanted)}",
            )
        if name != BATCH and loaded.max_length is not None and sizes[2] > loaded.max_length:
            raise InputError(
                f"{name} {sizes[2]} is beyond the {loaded.max_length} positions of {loaded.source}",
                fix=f"give {name} up to {loaded.max_length}",
            )
        wanted[name] = sizes
    return wanted


def _decoder_example(halves: Seq2Seq, length: int, *, cached: bool) -> Batch:
    batch = {DECODER: torch.zeros(_ROWS, _NEW, dtype=torch.long)}
    if halves.reads_text:
        batch[ENCODER_MASK] = torch.ones(_ROWS, length, dtype=torch.long)
    if cached:
        return {**batch, **empty_cross(halves, _ROWS, length), **empty_own(halves, _ROWS, _PAST)}
    return {**batch, ENCODED: torch.zeros(_ROWS, length, halves.width)}


def _length(encoder: NamedGraph) -> int:
    """Return how many positions the encoder puts out: those of the batch traced, or always."""
    output = next(value for value in encoder.model.graph.outputs if value.name == ENCODED)
    length = output.shape[1]
    return length if isinstance(length, int) else _READ


def _axes(name: str, halves: Seq2Seq) -> dict[int, str]:
    """Name the axes of an input that vary."""
    if name == DECODER:
        return {0: BATCH, 1: DECODER_SEQUENCE}
    if name.startswith(f"{PAST}.") and f".{CROSS}." not in name:
        return {0: BATCH, 2: PAST_SEQUENCE}
    if not halves.reads_text:  # images and sounds have one size, and so many positions
        return {0: BATCH}
    return {0: BATCH, (2 if name.startswith(f"{PAST}.") else 1): ENCODER_SEQUENCE}


def _notes(source: Batch) -> list[str]:
    """Say which sizes of the encoder's inputs are fixed."""
    return [
        f"{name} is fixed at {' x '.join(map(str, tensor.shape[1:]))}"
        for name, tensor in source.items()
        if tensor.is_floating_point()
    ]
