"""What a proof by digests found."""

from __future__ import annotations

from dataclasses import dataclass

SHOWN = 10
"""Differences that a message lists."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was proved; every root is `sha256:<hex>`.

    Attributes:
        base: the base's root.
        result: the root over the merged targets.
        targets: how many tensors the delta changes.
        extras: how many it stores whole.
        merged: the merged model's root (the logical one of a quantised model); empty if none was
            given.
    """

    base: str
    result: str
    targets: int
    extras: int
    merged: str
