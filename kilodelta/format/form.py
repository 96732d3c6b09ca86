"""What exact methods and compatibility forms have in common: options, groups, and two factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from kilodelta.exact.bases import Stream
from kilodelta.format.fields import Check
from kilodelta.format.packing import Group, Ints
from kilodelta.format.targets import Target


@dataclass(frozen=True, kw_only=True)
class Form(ABC):
    """One way from coefficients to an update that is a product left @ right of shape (out, in).

    A subclass is a frozen dataclass; its fields are the options that the manifest writes.
    """

    name: ClassVar[str]
    """How the manifest calls it."""
    paper: ClassVar[str]
    """Where it is described."""
    checks: ClassVar[Mapping[str, Check]]
    """What each option may be in a file."""
    full_rank: ClassVar[bool] = False
    """Whether the update's rank is not bounded by `rank`, so that it is no low-rank adapter."""

    rank: int
    """r of the paper."""

    @classmethod
    def option_names(cls, options: Mapping[str, Any]) -> set[str]:
        """Return the names that a manifest must have, given the values of those that it has."""
        return {option.name for option in fields(cls)}

    def to_manifest(self) -> dict[str, Any]:
        """Return the name and the options as the manifest writes them."""
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        names = self.option_names(options)
        return {"name": self.name, **{k: v for k, v in options.items() if k in names}}

    def shared(self) -> tuple[Group, ...]:
        """Return the groups that the whole file has once, in file order."""
        return ()

    @abstractmethod
    def groups(self, target: Target) -> tuple[Group, ...]:
        """Return the groups of one target, in file order."""

    @abstractmethod
    def left(self, q: Mapping[str, Ints], target: Target, stream: Stream, rows: range) -> Ints:
        """Compute rows of the left factor, (rows, K).

        Args:
            q: the target's coefficients by group name, the shared groups among them.
            target: whose update it is.
            stream: the random bases of the file's seed.
            rows: the rows of the factor that are wanted.
        """

    @abstractmethod
    def right(self, q: Mapping[str, Ints], target: Target, stream: Stream) -> Ints:
        """Compute the right factor, (K, in)."""

    def inner(self, target: Target) -> int:
        """Return K, the inner dimension of a target's product."""
        return self.rank

    @abstractmethod
    def draws(self, target: Target) -> int:
        """Estimate how many calls of a random generator a target's two factors take."""
