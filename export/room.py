"""Count what an export writes at least, before the merge, so that a disk is asked for it first.

Known are the merged copy of the weights, which lies beside the output while the work lasts, and
the weights of each graph. Engines come on top: what TensorRT makes of the weights is not known
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from kilodelta.export.merge.room import merged_need
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import DTYPES, TARGETS, named
from kilodelta.files.staging import Need
from kilodelta.files.tensor import TensorInfo
from kilodelta.format.delta import Delta
from kilodelta.grid.dequantise import float_bytes
from kilodelta.grid.model import QuantisedModel


def needs_of_export(
    base: Checkpoint | QuantisedModel, delta: Delta, out: Path, dtypes: Sequence[str]
) -> list[Need]:
    """List what an export puts beside and into its folder.

    Args:
        base: the model.
        delta: the fine-tune.
        out: the folder.
        dtypes: of the graphs, such as "float16".
    """
    needs = [merged_need(out, base, delta)]
    if isinstance(base, QuantisedModel):
        needs.append(Need(path=out, nbytes=float_bytes(base), what="its values as floats"))
    return [*needs, *(graph_need(base, out, dtype) for dtype in dtypes)]


def needs_of_bundle(base: Checkpoint | QuantisedModel, out: Path, dtype: str) -> list[Need]:
    """List what a device folder takes at least: the graph, and meanwhile the values of codes.

    Args:
        base: the model.
        out: the folder.
        dtype: of the graph, such as "float16".
    """
    graph = graph_need(base, out, dtype)
    if isinstance(base, Checkpoint):
        return [graph]
    return [Need(path=out, nbytes=float_bytes(base), what="the base's values as floats"), graph]


def graph_need(base: Checkpoint | QuantisedModel, out: Path, dtype: str) -> Need:
    """Count the bytes of a model's weights in a graph; of a quantised one its codes stay.

    Args:
        base: the model.
        out: the folder that the graph lies in.
        dtype: of its floats, such as "float16".
    """
    size = DTYPES[named(dtype).name].bits // 8
    if isinstance(base, Checkpoint):
        infos = [base.info(name) for name in base.names]
        codes = 0
    else:
        infos = [base.plain_info(name) for name in base.plain]
        places = {place for stored in base.stored.values() for place in stored.parts.values()}
        codes = sum(base.source.info(place).nbytes for place in places)
    nbytes = codes + sum(_bytes_in(info, size) for info in infos)
    return Need(path=out, nbytes=nbytes, what=f"the {named(dtype).short} graph")


def _bytes_in(info: TensorInfo, size: int) -> int:
    """Count a tensor's bytes where floats take `size` each."""
    return prod(info.shape) * size if info.dtype in TARGETS else info.nbytes
