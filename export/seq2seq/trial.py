"""Run an encoder's and a decoder's graph in ONNX Runtime, one after the other, against the module.

The module computes every pair of source and text at once and without a cache. A graph with a cache
gets the text in pieces. So a cache that is misread, a mask that is lost or a frozen size shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilodelta.errors import ExportError, one_line
from kilodelta.export.onnx.trial import OFF
from kilodelta.models import Batch, LoadedModel
from kilodelta.models.generation.cache import PAST, as_past
from kilodelta.models.generation.seq2seq import (
    DECODER,
    ENCODED,
    ENCODER_MASK,
    Seq2Seq,
    empty_own,
    source_example,
)
from kilodelta.models.quiet import quiet

_TEXTS: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (1, 1, (1, 1, 1)),  # from the first token on, one by one
    (2, 9, (9, 1, 2)),  # a prompt, a step, and a piece of two
    (3, 5, (4, 7, 1)),  # a second piece longer than the cache
    (1, 40, (30, 1)),  # longer than anything that was traced
)
"""Rows, tokens that the encoder reads, and the sizes of the pieces of the decoder's text."""


def try_halves(
    encoder: Any, decoder: Any, loaded: LoadedModel, halves: Seq2Seq, dtype: str
) -> None:
    """Compute texts of several sizes by both graphs, and compare with the module.

    Args:
        encoder: an `onnxruntime.InferenceSession` of the encoder's graph.
        decoder: one of the decoder's, with or without a cache.
        loaded: the module.
        halves: its sizes.
        dtype: of the graphs; other precisions than float32 are run, and not compared.

    Raises:
        ExportError: a graph stops, or computes something else.
    """
    limit = loaded.max_length or 1 << 20
    for rows, read, pieces in _TEXTS:
        cut = [n for n, end in zip(pieces, accumulate(pieces), strict=True) if end <= limit]
        if not cut:
            continue
        source = _source(loaded, halves, rows, min(read, limit))
        ids = torch.randint(
            halves.vocabulary, (rows, sum(cut)), generator=torch.Generator().manual_seed(rows)
        )
        where = f"{rows} x {' + '.join(map(str, cut))} tokens"
        try:
            made = run_halves(encoder, decoder, halves, source, ids, cut)
        except Exception as error:  # ONNX Runtime's own classes share no other base
            raise _wrong(loaded, f"at {where} ONNX Runtime stops: {one_line(error)}") from error
        if dtype == "float32":
            _compare(loaded, source, ids, made, where)


def _source(loaded: LoadedModel, halves: Seq2Seq, rows: int, tokens: int) -> Batch:
    """Make up what the encoder reads; row r of texts ends with r tokens of padding."""
    source = source_example(loaded, rows=rows, tokens=tokens)
    if halves.reads_text:
        for row in range(1, rows):
            source["attention_mask"][row, max(1, tokens - row) :] = 0
    return source


def run_halves(
    encoder: Any, decoder: Any, halves: Seq2Seq, source: Batch, ids: Tensor, pieces: list[int]
) -> dict[str, Any]:
    """Encode a batch once, and feed the decoder a text: in pieces, where it has a cache.

    Args:
        encoder, decoder: `onnxruntime.InferenceSession`s.
        halves: the model's sizes.
        source: what the encoder reads.
        ids: int64 `(rows, tokens)` for the decoder.
        pieces: how many tokens to feed at a time; they add up to all of them.

    Returns:
        float64 `encoder_hidden_states` and `logits`.
    """
    encoded = run_session(encoder, {name: tensor.numpy() for name, tensor in source.items()})
    fed = as_past(encoded)
    if halves.reads_text:
        fed[ENCODER_MASK] = source["attention_mask"].numpy()
    has_cache = any(port.name.startswith(f"{PAST}.") for port in decoder.get_inputs())
    cache = {n: t.numpy() for n, t in empty_own(halves, len(ids)).items()} if has_cache else {}
    logits, end = [], 0
    for piece in pieces if has_cache else [ids.shape[1]]:
        start, end = end, end + piece
        made = run_session(decoder, {**fed, **cache, DECODER: ids[:, start:end].numpy()})
        logits.append(made.pop("logits").astype(np.float64))
        cache = as_past(made)
    hidden = encoded[ENCODED].astype(np.float64)
    return {ENCODED: hidden, "logits": np.concatenate(logits, axis=1)}


def run_session(session: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Run a session on those of the arrays that it takes, floats in its precision.

    Args:
        session: an `onnxruntime.InferenceSession`.
        given: arrays by name, all that it takes among them.

    Returns:
        Its outputs by name.
    """
    fed = {}
    for port in session.get_inputs():
        array = given[port.name]
        fed[port.name] = array.astype(np.float16) if "float16" in port.type else array
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, fed), strict=True))


def _compare(
    loaded: LoadedModel, source: Batch, ids: Tensor, made: Mapping[str, Any], where: str
) -> None:
    with torch.no_grad(), quiet():
        hidden = loaded.module.get_encoder()(**source).last_hidden_state  # type: ignore[operator]
        logits = loaded.module(**source, decoder_input_ids=ids).logits
    mask = source.get("attention_mask")
    counts = np.ones(hidden.shape[:2], bool) if mask is None else mask.numpy() == 1
    for name, wanted, places in ((ENCODED, hidden, counts), ("logits", logits, ...)):
        actual, expected = made[name], wanted.double().numpy()
        if actual.shape != expected.shape:
            raise _wrong(loaded, f"at {where} {name} have shape {actual.shape}")
        norm = np.linalg.norm(expected[places]) or 1.0
        distance = np.linalg.norm(actual[places] - expected[places]) / norm
        if not distance <= OFF:
            raise _wrong(loaded, f"at {where} {name} are off by {distance:.2g}, relative")


def _wrong(loaded: LoadedModel, problem: str) -> ExportError:
    return ExportError(
        f"the exported encoder and decoder do not compute {type(loaded.module).__name__}: "
        f"{problem}",
        fix="give --inputs, so that the whole model is one graph, or use the versions in "
        "constraints.txt",
    )
