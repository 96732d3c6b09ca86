"""Hold what is settled before the first step, for all that trains, measures and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kilodelta.compress.distill.changes.compare import Change, energy
from kilodelta.compress.distill.changes.split import Split
from kilodelta.compress.distill.options import Options
from kilodelta.compress.distill.pair import Pair
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Method
from kilodelta.format.packing import Group
from kilodelta.format.targets import Patterns, Target
from kilodelta.grid.model import QuantisedModel
from kilodelta.models.weights import TORCH, values


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that is settled before the first step.

    Attributes:
        pair: both models.
        out: the file to write.
        options: how the user wants it.
        changes: what differs.
        split: how each change travels.
        targets: what coefficients change, in file order.
        patterns: the globs that choose exactly these.
        method: what trains, with its size.
        bits: of a coefficient.
        config: what the fine-tune changed in the base's configuration.
        warnings: what a user should hear of.
        quantised: the base as it is stored, where it is quantised; `pair.base` then holds its
            values as floats.
        precisions: what the file is to be good for (`--for`).
    """

    pair: Pair
    out: Path
    options: Options
    changes: tuple[Change, ...]
    split: Split
    targets: tuple[Target, ...]
    patterns: Patterns
    method: Method
    bits: int
    config: Mapping[str, Any]
    warnings: tuple[str, ...]
    quantised: QuantisedModel | None = None
    precisions: tuple[str, ...] = ()

    @property
    def built_on(self) -> Checkpoint | QuantisedModel:
        """The base that the file states."""
        return self.pair.base if self.quantised is None else self.quantised

    @property
    def coefficients(self) -> int:
        """How many numbers are trained, beside extras."""
        return sum(group.size for group in groups_of(self.method, self.targets))

    @property
    def name(self) -> str:
        """What the manifest calls the base."""
        return self.options.name or self.pair.base.path.name

    @property
    def dropped_share(self) -> float:
        """The share of the change's energy that the file does not carry, 0 to 1."""
        return energy(self.split.dropped) / max(energy(self.changes), 1e-60)

    def stored(self, name: str) -> RawTensor:
        """Return an extra as the tuned model has it, in the type that it is stored in."""
        change = next(change for change in self.split.extras if change.name == name)
        raw = self.pair.tuned.raw(name)
        return raw if raw.dtype == change.dtype else as_dtype(values(raw), change.dtype)


def as_dtype(tensor: torch.Tensor, dtype: str) -> RawTensor:
    """Copy a tensor's values in the type of a safetensors name."""
    return RawTensor.copy_of(tensor.to(TORCH[dtype]))


def groups_of(method: Method, targets: Sequence[Target]) -> list[Group]:
    """List all groups of coefficients that a file holds."""
    return [*method.shared(), *(group for target in targets for group in method.groups(target))]
