"""Open a quantised base: its exact values as a float folder, for as long as a compression runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kilodelta.grid.dequantise import float_folder
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import is_quantised, open_named


@contextmanager
def float_copy(base: Path, out: Path) -> Iterator[tuple[Path, QuantisedModel | None]]:
    """Give a base as a float model: itself, or a temporary copy of a quantised one's values.

    The copy holds each quantised weight as float32, one rounding of its exact value, and everything
    else as it is stored; it lies beside `out` and takes four bytes per weight.

    Args:
        base: a folder, or a file: of floats, or a GGUF file.
        out: the file that is to be written.

    Yields:
        The float model's place, and the quantised model; None where the base is none.

    Raises:
        CheckpointError: the base cannot be read.
        OutputError: the copy cannot be written.
    """
    if not is_quantised(base):
        yield base, None
        return
    model = open_named(base)
    with float_folder(model, beside=out) as place:
        yield place, model


def kinds_of(model: QuantisedModel) -> tuple[str, ...]:
    """Name the layouts of a quantised model's weights, sorted, each once."""
    return tuple(sorted({weight.layout.name for weight in model.stored.values()}))
