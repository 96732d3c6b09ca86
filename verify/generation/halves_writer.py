"""Let ONNX Runtime write by an encoder and a decoder, with or without the decoder's cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import KiloDeltaError, ProofError, one_line
from kilodelta.export.seq2seq.trial import run_session
from kilodelta.models import Batch
from kilodelta.models.generation.cache import as_past
from kilodelta.models.generation.seq2seq import DECODER, ENCODER_MASK, OWN
from kilodelta.verify.generation.writers import (
    Written,
    empty_cache_of,
    open_session,
    write_greedily,
)


class HalvesWriter:
    """ONNX Runtime on a CPU: a row is encoded once, then the decoder is fed token by token.

    Args:
        encoder: its graph.
        decoder: its graph; one without a cache is given the whole text at every step.
    """

    name = "onnxruntime-cpu"

    def __init__(self, encoder: Path, decoder: Path) -> None:
        self._paths = encoder, decoder
        self._encoder: Any = None
        self._decoder: Any = None

    def available(self) -> KiloDeltaError | None:
        """Open both graphs; return None, or why they cannot be; see `Writer`."""
        opened = [open_session(path) for path in self._paths]
        missing = next((one for one in opened if isinstance(one, KiloDeltaError)), None)
        if missing is None:
            self._encoder, self._decoder = opened
        return missing

    def write(
        self, ids: Sequence[int], most: int, end: Sequence[int], source: Batch | None = None
    ) -> Written:
        """Write of a row, after the tokens that a text begins with.

        Args:
            ids: those tokens.
            most: how many tokens to write at most.
            end: tokens that end a text.
            source: what the encoder reads, one row.

        Raises:
            ProofError: the runtime stops.
        """
        read = {name: tensor.numpy() for name, tensor in (source or {}).items()}
        try:
            encoded = run_session(self._encoder, read)
        except Exception as error:  # ONNX Runtime's own classes share no other base
            raise ProofError(
                f"ONNX Runtime stops at the encoder: {one_line(error)}", fix="export again"
            ) from error
        fixed = as_past(encoded)
        if "attention_mask" in read:
            fixed[ENCODER_MASK] = read["attention_mask"]
        return write_greedily(_Steps(self._decoder, fixed), ids, most, end)


class _Steps:
    """A decoder that is fed one text."""

    def __init__(self, session: Any, fixed: Mapping[str, Any]) -> None:
        self._session, self._fixed = session, fixed
        ports = session.get_inputs()
        self._cache = {p.name: empty_cache_of(p) for p in ports if f".{OWN}." in p.name}
        self._text: list[int] = []

    def __call__(self, new: Sequence[int], total: int) -> NDArray[Any]:
        """Return the scores after each of the new tokens, `(new, vocabulary)`."""
        self._text += new
        given = list(new) if self._cache else self._text
        ids = np.array([given], np.int64)
        made = run_session(self._session, {**self._fixed, **self._cache, DECODER: ids})
        logits: NDArray[Any] = made.pop("logits")[0, -len(new) :]
        self._cache = as_past(made)
        return logits
