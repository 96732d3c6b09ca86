"""All outputs that are matched, together: one loss, and measures for each and over all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kilodelta.compress.distill.learn.comparisons import Comparison
from kilodelta.compress.distill.learn.comparisons import Measures as Measures
from kilodelta.compress.distill.learn.late_head import LateTopClasses
from kilodelta.compress.distill.learn.outputs import Output
from kilodelta.errors import InputError


def mean_of(each: Sequence[Measures]) -> Measures:
    """Average measures of one output, taken in several ways."""
    return Measures(
        agreement=sum(one.agreement for one in each) / len(each),
        divergence=sum(one.divergence for one in each) / len(each),
    )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """All outputs that are matched, each with its comparison.

    Attributes:
        outputs: what they are; their weights add up to 1.
        comparisons: in the same order.
    """

    outputs: Sequence[Output]
    comparisons: Sequence[Comparison]

    @property
    def counts(self) -> str:
        """What the agreement counts: that of the outputs' kind, or `mixed`."""
        kinds = {comparison.counts for comparison in self.comparisons}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def loss(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        mask: Tensor | None,
        generator: torch.Generator,
    ) -> Tensor:
        """Add up the outputs' losses by their weights, ().

        Args:
            student: outputs by name, (rows, ...).
            teacher: the same of the tuned model.
            mask: (rows, tokens), 1 where a token counts.
            generator: draws what a loss draws.

        Raises:
            InputError: an output's shapes differ.
        """
        parts = [
            output.weight
            * comparison.loss(*self._pair(output, comparison, student, teacher, mask), generator)
            for output, comparison in zip(self.outputs, self.comparisons, strict=True)
        ]
        return torch.stack(parts).sum()

    def row_divergences(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Tensor | None
    ) -> Tensor | None:
        """Return each row's divergence, (rows,), over all outputs by their weights.

        None where a comparison draws no rows by it; see `loss` for the arguments.
        """
        if not all(comparison.by_divergence for comparison in self.comparisons):
            return None
        parts = [
            output.weight
            * comparison.row_divergences(*self._pair(output, comparison, student, teacher, mask))
            for output, comparison in zip(self.outputs, self.comparisons, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def sums(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], mask: Tensor | None
    ) -> list[Tensor]:
        """Return what `measures` needs of a batch, per output; see `loss` for the arguments."""
        return [
            comparison.sums(*self._pair(output, comparison, student, teacher, mask))
            for output, comparison in zip(self.outputs, self.comparisons, strict=True)
        ]

    def measures(self, sums: Sequence[Tensor]) -> tuple[Measures, ...]:
        """Return the measures per output, of the sums over all batches."""
        return tuple(c.measures(part) for c, part in zip(self.comparisons, sums, strict=True))

    def overall(self, each: Sequence[Measures]) -> Measures:
        """Average the outputs' measures by their weights."""
        pairs = list(zip(self.outputs, each, strict=True))
        return Measures(
            agreement=sum(output.weight * one.agreement for output, one in pairs),
            divergence=sum(output.weight * one.divergence for output, one in pairs),
        )

    def _pair(
        self,
        output: Output,
        comparison: Comparison,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ours, theirs = student[output.name], teacher[output.name]
        if not isinstance(comparison, LateTopClasses):  # there, `ours` are hidden states
            _check_classes(output, ours)
        if ours.shape[:-1] != theirs.shape[:-1] if output.kept else ours.shape != theirs.shape:
            raise InputError(
                f"output {output.name} is {tuple(ours.shape)} of the base with the update and"
                f" {tuple(theirs.shape)} of the tuned model",
                fix="give models of one architecture, whose outputs have the same shapes",
            )
        values, weights = output.aligned(ours, mask)
        wanted, _ = output.aligned(theirs.to(ours.device), mask)
        return values, wanted, weights


def _check_classes(output: Output, ours: Tensor) -> None:
    """Refuse a student that chooses among other classes than the teacher does."""
    if output.axis is None or not output.size or ours.shape[output.axis] == output.size:
        return
    raise InputError(
        f"output {output.name} has {ours.shape[output.axis]} classes or features of the base with"
        f" the update and {output.size} of the tuned model",
        fix="give models of one vocabulary: a fine-tune that added tokens needs a base with as many"
        " rows in its embedding",
    )
