"""Run a graph with a cache in ONNX Runtime, whole prompts and single steps, against the module.

Every text is computed by the module at once and without a cache, and by the graph in pieces: so
a cache that is misread, a position that is off or a frozen size shows in the logits.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilodelta.errors import ExportError, one_line
from kilodelta.export.onnx.trial import OFF
from kilodelta.models import LoadedModel
from kilodelta.models.generation.cache import CacheLayer, as_past, empty_cache, feeds
from kilodelta.models.quiet import quiet

_TEXTS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, (1, 1, 1)),  # from the first token on, one by one
    (2, (9, 1, 2)),  # a prompt, a step, and a piece of two
    (3, (4, 7, 1)),  # a second piece longer than the cache
    (1, (40, 1)),  # longer than anything that was traced
)
"""Rows, and the sizes of the pieces of a text."""


def try_steps(
    session: Any, loaded: LoadedModel, layers: tuple[CacheLayer, ...], dtype: str
) -> None:
    """Compute texts in pieces, and compare all logits with the module's.

    Args:
        session: an `onnxruntime.InferenceSession` of the graph.
        loaded: the module.
        layers: of its cache.
        dtype: of the graph; other precisions than float32 are run, and not compared.

    Raises:
        ExportError: the graph stops, or computes something else.
    """
    limit = loaded.max_length or 1 << 20
    for rows, pieces in _TEXTS:
        cut = [n for n, end in zip(pieces, accumulate(pieces), strict=True) if end <= limit]
        if cut:
            _try_text(session, loaded, layers, dtype, _tokens(loaded, rows, sum(cut)), cut)


def _tokens(loaded: LoadedModel, rows: int, count: int) -> Tensor:
    words = loaded.module.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(words, (rows, count), generator=torch.Generator().manual_seed(count))


def _try_text(
    session: Any,
    loaded: LoadedModel,
    layers: tuple[CacheLayer, ...],
    dtype: str,
    ids: Tensor,
    pieces: list[int],
) -> None:
    where = f"{ids.shape[0]} x {' + '.join(map(str, pieces))} tokens"
    mask = _padded(len(ids), pieces)
    try:
        logits = run_in_pieces(session, loaded, layers, ids, mask, pieces)
    except Exception as error:  # ONNX Runtime's own classes share no other base
        raise _wrong(loaded, f"at {where} ONNX Runtime stops: {one_line(error)}") from error
    if dtype != "float32":
        return
    with torch.no_grad(), quiet():
        wanted = loaded.module(**feeds(loaded.module, ids, mask, {})).logits
    if logits.shape != tuple(wanted.shape):
        raise _wrong(loaded, f"at {where} logits have shape {logits.shape}")
    counts = mask.numpy() == 1  # nothing depends on what a padding token puts out
    expected = wanted.numpy().astype(np.float64)[counts]
    distance = np.linalg.norm(logits[counts] - expected) / (np.linalg.norm(expected) or 1.0)
    if not distance <= OFF:
        raise _wrong(loaded, f"at {where} logits are off by {distance:.2g}, relative")


def _padded(rows: int, pieces: list[int]) -> Tensor:
    """A mask where row r ends its prompt with r tokens of padding, as prompts of a batch do."""
    mask = torch.ones(rows, sum(pieces), dtype=torch.long)
    for row in range(1, rows):
        mask[row, max(1, pieces[0] - row) : pieces[0]] = 0
    return mask


def run_in_pieces(
    session: Any,
    loaded: LoadedModel,
    layers: tuple[CacheLayer, ...],
    ids: Tensor,
    mask: Tensor,
    pieces: list[int],
) -> Any:
    """Feed a text piece by piece, handing the cache on.

    Args:
        session: an `onnxruntime.InferenceSession` of the graph.
        loaded: the module that it computes.
        layers: of its cache.
        ids: int64 `(rows, tokens)`.
        mask: int64 of the same shape, 0 at padding.
        pieces: how many tokens to feed at a time; they add up to all of them.

    Returns:
        float64 `(rows, tokens, vocabulary)`.
    """
    kinds = {port.name: port.type for port in session.get_inputs()}
    names = [port.name for port in session.get_outputs()]
    cache = {n: t.numpy() for n, t in empty_cache(layers, len(ids)).items()}
    logits, end = [], 0
    for piece in pieces:
        start, end = end, end + piece
        batch = feeds(loaded.module, ids[:, start:end], mask[:, :end], {})
        fed = {**{n: t.numpy() for n, t in batch.items()}, **cache}
        fed = {n: a.astype(np.float16) if "float16" in kinds[n] else a for n, a in fed.items()}
        made = dict(zip(names, session.run(names, fed), strict=True))
        logits.append(made.pop("logits").astype(np.float64))
        cache = as_past(made)
    return np.concatenate(logits, axis=1)


def _wrong(loaded: LoadedModel, problem: str) -> ExportError:
    return ExportError(
        f"the exported graph with a cache does not compute {type(loaded.module).__name__}: "
        f"{problem}",
        fix="export it without --kv-cache, or with the versions in constraints.txt",
    )
