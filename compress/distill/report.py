"""What a compression kept, what it cost, and what a user should hear of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kilodelta.compress.distill.changes.compare import Change
from kilodelta.compress.distill.learn.objective import Measures
from kilodelta.compress.distill.learn.schedule import Look
from kilodelta.compress.distill.precisions.fidelity import Fidelity
from kilodelta.compress.distill.svd import Layer


@dataclass(frozen=True, kw_only=True)
class Matched:
    """One output of the model that was matched.

    Attributes:
        name: dotted where outputs are nested.
        kind: how it was compared (docs/compress.md).
        counts: what its agreement counts: `top-1`, `yes-no`, `cosine` or `r2`.
        axis: the axis of classes or features; None where there is none.
        size: how many classes or features; 0 where there is no such axis, or it is the tokens'.
        weight: its share of the loss and of the agreement.
        before: the base model against the tuned one.
        after: the base with this file against the tuned one.
    """

    name: str
    kind: str
    counts: str
    axis: int | None
    size: int
    weight: float
    before: Measures
    after: Measures


@dataclass(frozen=True, kw_only=True)
class Size:
    """One way to write the change.

    Attributes:
        name: of the way; sizes of one name are one line of a picture.
        nbytes: bytes of the file.
        agreement: with the tuned model, on the held-out inputs.
        how: its rank, and of how many tensors, where that is worth a word.
    """

    name: str
    nbytes: int
    agreement: float
    how: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of `compress`; measures are on held-out inputs, None without inputs.

    Attributes:
        path: the file.
        method: its name and options.
        bits: of a coefficient.
        nbytes: bytes by part (coefficients, extras, header) and of the whole file.
        tuned_bytes: bytes of the tuned model's tensors.
        outputs: the outputs that were matched.
        ignored: why each other output was not, by name.
        kind: what `agreement` counts: that of all outputs, or `mixed`.
        held_out: how many inputs were measured on.
        before: the base model against the tuned one, over all outputs by their weights. Tensors
            that only the tuned model has, such as a new head, are in place.
        after: the same of the base with this file, merged, in the base's types.
        curve: each look at the held-out inputs while training: step, agreement, divergence.
        weight_error: ||what is missed|| / ||the whole change||: 0 nothing, 1 all of it.
        layers: what each target's update carries of its change.
        targets: how many tensors coefficients change.
        extras: tensors that are stored whole.
        new: those of them that the base lacks, or has in another shape.
        dropped: changed tensors that the file does not carry.
        dropped_energy: their share of the change's energy, 0 to 1.
        config: what the fine-tune changed in the base's configuration, and the file carries.
        steps: training steps taken.
        seconds: time spent in them.
        interrupted: whether training was stopped early.
        result: the root of the merged targets.
        fidelity: what it keeps in each precision that was asked for.
        quantised: whether the base is.
        warnings: what a user should hear of, a sentence each.
        dtype: what `--dtype` was, or what its `auto` became; empty without inputs.
        sizes: for a report's picture, what this many bytes keep by this file and by other ways.
    """

    path: Path
    method: Mapping[str, str | int]
    bits: int
    nbytes: Mapping[str, int]
    tuned_bytes: int
    outputs: tuple[Matched, ...]
    ignored: Mapping[str, str]
    kind: str
    held_out: int
    before: Measures | None
    after: Measures | None
    curve: tuple[Look, ...]
    weight_error: float
    layers: tuple[Layer, ...]
    targets: int
    extras: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[Change, ...]
    dropped_energy: float
    config: Mapping[str, Any]
    steps: int
    seconds: float
    interrupted: bool
    result: str
    warnings: tuple[str, ...]
    sizes: tuple[Size, ...] = ()
    fidelity: tuple[Fidelity, ...] = ()
    quantised: bool = False
    dtype: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        table = asdict(self)
        table["path"] = str(self.path)
        for one in table["fidelity"]:
            del one["outputs"]
        table["dropped"] = [change.name for change in self.dropped]
        return table
