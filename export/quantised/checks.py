"""Refuse, before any work, what cannot be exported of a quantised base."""

from __future__ import annotations

from kilodelta.errors import InputError
from kilodelta.export.options import Options
from kilodelta.export.quantised.constants import require_exact
from kilodelta.export.quantised.engines import require_engine
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.grid.model import QuantisedModel


def check_quantised(base: QuantisedModel, delta: Delta, options: Options) -> None:
    """Check that graphs, and engines where they are asked for, can hold the base's grids.

    Args:
        base: the quantised base; a merge keeps its scales and zero points.
        delta: made for it.
        options: what is asked for.

    Raises:
        InputError: the base is a single file, or an engine is to be refittable.
        ExportError: a weight cannot be held exactly, or no engine be built of it.
    """
    if not isinstance(base.source, Checkpoint):
        raise InputError(
            f"{base.path} is one file, and an export takes a folder, whose config.json says what"
            " the architecture is",
            fix="merge into it: kilodelta merge BASE FILE -o OUT"
            f"{base.path.suffix}; an .onnx file runs as it is",
        )
    if options.refittable:
        raise InputError(
            "an engine of a quantised base is asked for with weights that can be exchanged, and"
            " TensorRT refits no codes",
            fix="leave --refittable out",
        )
    for name in base.stored:
        matrix = base.matrix(name)
        for dtype in options.dtypes:
            require_exact(name, matrix, dtype)
        if options.capabilities:
            require_engine(name, matrix, options.capabilities)
