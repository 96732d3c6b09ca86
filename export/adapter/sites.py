"""Find where a graph uses a weight, and in which of the ways that a low-rank update can join.

A use that is none of those takes the updated weight itself, W + A B, made anew at each request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kilodelta.export.adapter.layout import Use

Kind = Literal["linear", "rows", "conv", "whole"]


@dataclass(frozen=True, kw_only=True)
class GraphSite:
    """One use of a weight.

    Attributes:
        kind: `linear` multiplies by it, `rows` picks rows, `conv` convolves, `whole` is the rest.
        node: the `onnx_ir.Node`.
        index: which of the node's inputs it is.
        turned: whether it is used transposed.
    """

    kind: Kind
    node: Any
    index: int
    turned: bool = False


def sites(weight: Any) -> tuple[GraphSite, ...]:
    """Find all uses of an `onnx_ir.Value`, those behind a transposition included."""
    uses: list[GraphSite] = []
    for node, index in weight.uses():
        if node.op_type == "Transpose" and _order(node) == (1, 0):
            behind = [_site(user, place, turned=True) for user, place in node.outputs[0].uses()]
            uses += behind if _all_linear(behind) else [_whole(node, index)]
        else:
            uses.append(_site(node, index, turned=False))
    return tuple(uses)


def use_of(uses: Sequence[GraphSite]) -> Use:
    """Choose the layout of factors that suits all uses of one weight."""
    if not uses:
        return "unused"
    if all(site.kind == "conv" for site in uses):
        return "conv"
    return "turned" if all(site.turned for site in uses) else "straight"


def is_layer(uses: Sequence[GraphSite], *, by_row: bool = False) -> bool:
    """Return whether a weight is one of a linear layer or a convolution, and nothing else.

    Args:
        uses: of the weight.
        by_row: leave out grouped and transposed convolutions, to whose weight the update is added
            as a whole: that one weight computes all rows of a batch.
    """
    return all(
        site.kind in ("linear", "conv") or (not by_row and _is_convolution(site)) for site in uses
    )


def _is_convolution(site: GraphSite) -> bool:
    return site.node.op_type in ("Conv", "ConvTranspose") and site.index == 1


def _all_linear(uses: Iterable[GraphSite]) -> bool:
    return all(site.kind == "linear" for site in uses)


def _site(node: Any, index: int, *, turned: bool) -> GraphSite:
    flat = len(node.inputs[index].shape or ()) == 2 or turned
    if node.op_type == "MatMul" and index == 1 and flat:
        return GraphSite(kind="linear", node=node, index=index, turned=turned)
    if node.op_type == "Gemm" and index == 1 and _is_plain_gemm(node):
        by_gemm = bool(number(node, "transB", 0))
        return GraphSite(kind="linear", node=node, index=index, turned=turned != by_gemm)
    if node.op_type == "Gather" and index == 0 and flat and not number(node, "axis", 0):
        return GraphSite(kind="rows", node=node, index=index, turned=turned)
    if node.op_type == "Conv" and index == 1 and number(node, "group", 1) == 1:
        return GraphSite(kind="conv", node=node, index=index)
    return _whole(node, index)


def _whole(node: Any, index: int) -> GraphSite:
    return GraphSite(kind="whole", node=node, index=index)


def _is_plain_gemm(node: Any) -> bool:
    return not number(node, "transA", 0) and number(node, "alpha", 1) == 1


def _order(node: Any) -> tuple[int, ...]:
    attribute = node.attributes.get("perm")
    return tuple(attribute.value) if attribute is not None else ()


def number(node: Any, name: str, default: int) -> Any:
    """Return a node's attribute, or what ONNX takes where it is left out."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value
