"""Choose how an output is compared, by its kind and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kilodelta.compress.distill.learn.comparisons.embeddings import PULL, PULLED, Head, Relational
from kilodelta.compress.distill.learn.comparisons.interface import Comparison
from kilodelta.compress.distill.learn.comparisons.kinds import (
    Classes,
    Labels,
    States,
    TopClasses,
    Values,
)
from kilodelta.compress.distill.learn.outputs import Output


def comparison_for(
    output: Output,
    *,
    bank: Tensor | None = None,
    labels: Tensor | None = None,
    coefficients: int = 0,
) -> Comparison:
    """Choose how an output is compared.

    Args:
        output: what it is.
        bank: the teacher's embeddings of other inputs, (n, width).
        labels: the embeddings of a fixed set of labels or queries, (n, width): what counts then
            is the distribution over them that an embedding's cosines give.
        coefficients: how many the student has to follow the embeddings with, beside the labels.
    """
    if output.kind == "embedding" and labels is not None:
        return Head(labels, pull=PULL * min(1.0, coefficients / PULLED))
    if output.kind == "embedding" and bank is not None:
        return Relational(bank)
    return TopClasses() if output.kept else _BY_KIND[output.kind]()


_BY_KIND: Mapping[str, type[Classes | Labels | States]] = {
    "classes": Classes,
    "span": Classes,
    "labels": Labels,
    "embedding": States,
    "states": States,
    "values": Values,
}
