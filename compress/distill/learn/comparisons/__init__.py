"""Compare what a student computes with its teacher: a loss and measures for each kind of output.

Logits are compared as distributions, embeddings by the space that they live in, other states by
their normalised mean square; `comparison_for` chooses. Measures are made of sums over positions,
so that batches of any sizes give the same figure.
"""

from __future__ import annotations

from kilodelta.compress.distill.learn.comparisons.choice import comparison_for as comparison_for
from kilodelta.compress.distill.learn.comparisons.embeddings import BANK as BANK
from kilodelta.compress.distill.learn.comparisons.embeddings import PULL as PULL
from kilodelta.compress.distill.learn.comparisons.embeddings import PULLED as PULLED
from kilodelta.compress.distill.learn.comparisons.embeddings import SHARPNESS as SHARPNESS
from kilodelta.compress.distill.learn.comparisons.embeddings import Head as Head
from kilodelta.compress.distill.learn.comparisons.embeddings import Relational as Relational
from kilodelta.compress.distill.learn.comparisons.interface import Comparison as Comparison
from kilodelta.compress.distill.learn.comparisons.interface import Measures as Measures
from kilodelta.compress.distill.learn.comparisons.kinds import Classes as Classes
from kilodelta.compress.distill.learn.comparisons.kinds import Labels as Labels
from kilodelta.compress.distill.learn.comparisons.kinds import States as States
from kilodelta.compress.distill.learn.comparisons.kinds import TopClasses as TopClasses
from kilodelta.compress.distill.learn.comparisons.kinds import Values as Values
from kilodelta.compress.distill.learn.comparisons.scores import cosine as cosine
from kilodelta.compress.distill.learn.comparisons.scores import kl as kl
from kilodelta.compress.distill.learn.comparisons.scores import top1 as top1
from kilodelta.compress.distill.learn.comparisons.scores import weighted_mean as weighted_mean

__all__ = [
    "BANK", "PULL", "PULLED", "SHARPNESS", "Classes", "Comparison", "Head", "Labels", "Measures",
    "Relational", "States", "TopClasses", "Values", "comparison_for", "cosine", "kl", "top1",
    "weighted_mean",
]  # fmt: skip
