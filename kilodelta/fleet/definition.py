"""Describe a fleet: its bases, fine-tunes and targets, as `fleet.toml` names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class FleetBase:
    """A base model: its name here, where it is, and how it is opened."""

    name: str
    path: Path
    inputs: Path | None = None
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """One fine-tune: a tuned model that is compressed, or a `.kd` file that exists."""

    name: str
    base: str
    tuned: Path | None = None
    delta: Path | None = None
    inputs: Path | None = None
    labels: Path | None = None
    compress: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FleetTarget:
    """What is made of every fine-tune, with the options of its kind."""

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A whole fleet file, its globs resolved."""

    path: Path
    bases: Mapping[str, FleetBase]
    fine_tunes: tuple[FineTune, ...]
    targets: tuple[FleetTarget, ...]
