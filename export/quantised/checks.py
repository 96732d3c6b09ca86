"""Refuse, before any work, what cannot be exported of a quantised base."""

from __future__ import annotations

from collections.abc import Sequence

from kilodelta.errors import InputError
from kilodelta.export.options import Options
from kilodelta.export.quantised.constants import (
    fits_nbits,
    require_exact,
    require_no_minima,
    require_runnable,
)
from kilodelta.export.quantised.engines import require_engine
from kilodelta.export.quantised.graph import AUTO, NBITS, settled
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
        InputError: the base is an ONNX graph, or a GGUF file that is read by its own names; or an
            engine is to be refittable.
        ExportError: a weight cannot be held exactly, or no engine be built of it.
    """
    if base.method != "gguf":
        require_folder(base, "an export")
    elif not base.renamed:
        raise InputError(
            f"{base.path} is a GGUF file, and the .kd file names tensors as it does, by which no"
            " model of transformers is built",
            fix="merge into it: kilodelta merge BASE FILE -o OUT.gguf; what is compressed against"
            " it, or rebased to it from the float model, can be exported",
        )
    if options.refittable:
        raise InputError(
            "an engine of a quantised base is asked for with weights that can be exchanged, and"
            " TensorRT refits no codes",
            fix="leave --refittable out",
        )
    form = settled(options.blocks, for_engines=bool(options.capabilities))
    require_grids(base, options.dtypes, options.capabilities, form=form)


def refuse_blocks(blocks: str, base: object) -> None:
    """Refuse operators for codes where the base has none.

    Args:
        blocks: what was asked for.
        base: the float model, for the message.

    Raises:
        InputError: it is other than `auto`.
    """
    if blocks != AUTO:
        raise InputError(
            f"--blocks {blocks} chooses the operators for a quantised base's codes, and {base} is a"
            " float model",
            fix="leave --blocks out, or give the quantised model as BASE",
        )


def require_folder(base: QuantisedModel, what: str) -> None:
    """Check that a quantised base is a folder, of which a graph can be made.

    Args:
        base: the quantised base.
        what: what needs a folder, for the message.

    Raises:
        InputError: it is a GGUF file or an ONNX graph.
    """
    if not isinstance(base.source, Checkpoint):
        raise InputError(
            f"{base.path} is one file, and {what} takes a folder, whose config.json says what"
            " the architecture is",
            fix="merge into it: kilodelta merge BASE FILE -o OUT"
            f"{base.path.suffix}; an .onnx file runs as it is",
        )


def require_grids(
    base: QuantisedModel,
    dtypes: Sequence[str],
    capabilities: Sequence[str] = (),
    *,
    form: str = NBITS,
) -> None:
    """Check that graphs, and engines where there are any, can hold each weight's grid.

    Args:
        base: the quantised base.
        dtypes: what the graphs compute in.
        capabilities: GPUs to build engines for, such as "sm89".
        form: the operators, `matmulnbits` or `qdq`.

    Raises:
        ExportError: a weight cannot be held exactly, no engine be built of it, or without engines
            no ONNX Runtime run it.
    """
    for name in base.stored:
        matrix = base.matrix(name)
        if not capabilities:  # whatever its scales are
            require_runnable(name, matrix)
        for dtype in dtypes:
            require_exact(name, matrix, dtype)
        if capabilities:  # before minima, whose way out is another one for engines
            require_engine(name, matrix, capabilities)
        for dtype in dtypes:
            if form != NBITS or dtype == "bfloat16" or not fits_nbits(matrix):
                require_no_minima(name, matrix)
