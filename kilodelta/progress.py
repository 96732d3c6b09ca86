"""How long work tells its caller where it stands: one callback, no printing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Event:
    """One step of a stage: `done` of `total` units (`total` 0 where it is not known)."""

    stage: str
    done: int
    total: int
    unit: str
    detail: Mapping[str, float | str] = field(default_factory=lambda: MappingProxyType({}))


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """The default: tell nobody."""
