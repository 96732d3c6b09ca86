"""Choose shapes that the model computes and that fit into memory, and say what that will take.

A decoder at 32 rows of 512 tokens puts out 32 x 512 x 50,000 logits: 6.6 GB in float64, held for
merged model, base and artefact at once. So the largest shapes are cut to what fits, rows first,
since every position of a row is another computation and every row is the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from kilodelta import memory
from kilodelta.errors import InputError
from kilodelta.export.manifest.facts import Profile, Shape
from kilodelta.progress import Event, Progress, silent
from kilodelta.verify.parity.fitting import MASK, Shapes
from kilodelta.verify.parity.traits import Cost, Trial, longest
from kilodelta.verify.runners import blockwise
from kilodelta.verify.runners.runner import Batch

BYTES = 40
"""Memory per output element: 8 each for merged model, base and errors in float64, the artefact's
own output and its copy in float32, and the result of plain torch."""
SHARE = 0.5
"""Of the memory that is available: weights, activations and the runtime take the rest."""
MOST = 2 << 30
"""Bytes that outputs may take where more is available: about 1,000 positions of a vocabulary of
50,000. More rows are the same computation on other words, and minutes of float64."""
PASS_ELEMENTS, PASS_SECONDS = 1 << 24, 5.0
"""Of one pass of the reference: beyond these, rows are computed a few at a time."""
_BRIEF = 8
"""Steps from the smallest shapes: enough to try what does not depend on the length."""
WIDE = 2.5
"""How many times as long float64 takes as float32, at least."""


@dataclass(frozen=True, kw_only=True)
class ParityPlan:
    """What will be computed.

    Attributes:
        profile: by input its smallest, usual and largest shape, cut to what is possible here.
        rows: rows per pass of the reference; None computes a case at once.
        nbytes: memory for the outputs of the largest case.
        seconds: torch's time for the reference, estimated from one row.
        notes: sentences about shapes that were cut.
        whole: rows have to stay as they are, neither cut nor padded: the model refuses others.
    """

    profile: Profile
    rows: int | None
    nbytes: int
    seconds: float
    notes: tuple[str, ...]
    whole: bool


def plan(
    module: torch.nn.Module,
    outputs: Sequence[str],
    batch: Batch,
    profile: Profile,
    *,
    limit: int | None = None,
    progress: Progress = silent,
) -> ParityPlan:
    """Try the model on few rows, and cut a profile to what it computes and memory holds.

    Args:
        module: takes named tensors.
        outputs: the outputs that will be compared.
        batch: real inputs.
        profile: by input its smallest, usual and largest shape.
        limit: bytes that the outputs may take; by default half of what is available, `MOST` at
            most.
        progress: called with the estimate.

    Raises:
        InputError: the model cannot compute the smallest shapes, or they do not fit.
    """
    if limit is None:
        limit = min(MOST, int(memory.available() * SHARE))
    progress(Event(stage="estimate", done=0, total=1, unit="plans"))
    _require_weights_fit(module)
    chosen = _Planner(module, outputs, batch, profile, limit).plan()
    detail = {
        "memory": _gigabytes(chosen.nbytes + blockwise.needed(module)),
        "time": f"about {chosen.seconds:.0f} s of torch on one CPU",
    }
    progress(Event(stage="estimate", done=1, total=1, unit="plans", detail=detail))
    return chosen


def _require_weights_fit(module: torch.nn.Module) -> None:
    """Check that the reference's float64 weights fit; those of one model are held at a time.

    Raises:
        InputError: they do not; both numbers are said.
    """
    needed, free = blockwise.needed(module), memory.available()
    if needed > free:
        raise InputError(
            f"the reference's weights take {_gigabytes(needed)} in float64, and"
            f" {_gigabytes(free)} are free",
            fix="verify on a machine with more memory; without --inputs, digests are proved alone",
        )


class _Planner:
    """Walks from the smallest shapes to the largest; each step makes every axis longer by one."""

    def __init__(
        self,
        module: torch.nn.Module,
        outputs: Sequence[str],
        batch: Batch,
        profile: Profile,
        limit: int,
    ) -> None:
        self._trial = Trial(module, outputs, batch)
        self._batch = batch
        self._profile, self._limit = profile, limit
        self._costs: dict[int, Cost] = {}
        self._last = self._steps(2)
        self._reason = ""
        self._notes: list[str] = []

    def plan(self) -> ParityPlan:
        if not (self._computes(0) and self._takes_padding()):
            self._keep_rows()
        usual = self._steps(1)
        top = self._longest(usual, self._last)
        usual = min(usual, top)
        rows = {point: self._rows(point, step) for point, step in ((1, usual), (2, top))}
        cut: Profile = {
            name: (
                points[0],
                (rows[1], *self._shape(name, 1, usual)[1:]),
                (rows[2], *self._shape(name, 2, top)[1:]),
            )
            for name, points in self._profile.items()
        }
        self._note_memory(next(iter(cut.values()))[2])
        # A pass over one row is mostly overhead where the model is small.
        overhead = self._cost(0).seconds
        seconds = 2 * overhead + sum(
            rows[point] * max(0.0, self._seconds(step) - overhead / self._least)
            for point, step in ((1, usual), (2, top))
        )
        return ParityPlan(
            profile=cut,
            rows=self._rows_per_pass(top, max(rows.values())),
            nbytes=self._nbytes(self._cost(top).elements) * rows[2] // self._least,
            seconds=(2 * WIDE + 1) * seconds,
            notes=tuple(self._notes),
            whole=self._trial.padding == "own",
        )

    def _takes_padding(self) -> bool:
        """Return whether the model computes rows that are padded, if it knows padding."""
        step = min(self._steps(1), _BRIEF)
        if MASK not in self._profile:
            return True
        if not self._computes(step):
            step = 0
        if self._at(step)[MASK][1] < 2:
            return True
        self._trial.padding = "right"
        try:
            self._trial.cost(self._at(step))
        except InputError as error:
            self._reason = error.what
            return False
        finally:
            self._trial.padding = "none"
        return True

    def _keep_rows(self) -> None:
        """Let the number of rows alone vary: shorter rows are no inputs of this model.

        A vision-language model wants as many places for a picture in the text as the picture has
        patches, so that a text cannot be cut.

        Raises:
            InputError: the model cannot compute whole rows either, or the profile has none.
        """
        own = {name: self._batch[name].shape[1:] for name in self._profile}
        inside = all(
            low <= size <= high
            for name, (least, _, most) in self._profile.items()
            for low, size, high in zip(least[1:], own[name], most[1:], strict=True)
        )
        if not inside:
            self._cost(0)
        self._profile = {
            name: (
                (least[0], *own[name]),
                (usual[0], *own[name]),
                (most[0], *own[name]),
            )
            for name, (least, usual, most) in self._profile.items()
        }
        self._trial.padding, reason = "own", self._reason
        self._last = self._steps(2)
        self._cost(0)
        self._notes.append(f"compared at the inputs' own lengths alone: {reason}")

    @property
    def _least(self) -> int:
        """Rows of the smallest shapes, with which everything is tried."""
        return next(iter(self._profile.values()))[0][0]

    def _steps(self, point: int) -> int:
        """Count the steps from the smallest shapes to the usual (1) or the largest (2)."""
        return max(
            (high - low)
            for points in self._profile.values()
            for low, high in zip((0, *points[0][1:]), (0, *points[point][1:]), strict=True)
        )

    def _shape(self, name: str, point: int, step: int) -> Shape:
        """Return one input's shape at a point of the profile, each axis within so many steps."""
        smallest, wanted = self._profile[name][0], self._profile[name][point]
        return (
            self._least,
            *(min(n, low + step) for low, n in zip(smallest[1:], wanted[1:], strict=True)),
        )

    def _at(self, step: int) -> Shapes:
        return {name: self._shape(name, 2, step) for name in self._profile}

    def _cost(self, step: int) -> Cost:
        if step not in self._costs:
            self._costs[step] = self._trial.cost(self._at(step))
        return self._costs[step]

    def _computes(self, step: int) -> bool:
        try:
            self._cost(step)
        except InputError as error:
            self._reason = error.what
            return False
        return True

    def _longest(self, usual: int, last: int) -> int:
        """Find the last step that the model computes and whose fewest rows fit into memory."""
        if not self._computes(usual):
            return self._stopped(longest(self._computes, 0, usual), last)
        if not self._fits(0):
            raise InputError(
                f"comparing {self._text(0)} takes {_gigabytes(self._nbytes(self._elements(0)))}, "
                f"and {_gigabytes(self._limit)} may be used here",
                fix="verify on a machine with more memory, or compare fewer outputs",
            )
        top = longest(self._fits, 0, last)
        if not self._computes(top):
            return self._stopped(longest(self._computes, min(usual, top), top), top)
        return top

    def _stopped(self, top: int, wanted: int) -> int:
        self._last = top
        self._notes.append(
            f"compared up to {self._text(top)}, not {self._text(wanted)}: {self._reason}"
        )
        return top

    def _elements(self, step: int) -> int:
        """Output elements of the fewest rows: as measured, else in proportion to the inputs.

        Outputs that were as large at two lengths, a classifier's, do not depend on it.
        """
        if step in self._costs:
            return self._costs[step].elements
        measured = self._costs[max(self._costs)]
        if len(self._costs) > 1 and len({cost.elements for cost in self._costs.values()}) == 1:
            return measured.elements
        wanted = sum(prod(shape) for shape in self._at(step).values())
        return -(-measured.elements * wanted // measured.inputs)

    def _nbytes(self, elements: int) -> int:
        return elements * BYTES

    def _fits(self, step: int) -> bool:
        return self._nbytes(self._elements(step)) <= self._limit

    def _rows(self, point: int, step: int) -> int:
        """Rows at a point of the profile, as many of them as fit."""
        each = self._nbytes(self._cost(step).elements) / self._least
        return max(self._least, min(self._wanted(point), int(self._limit / max(each, 1))))

    def _wanted(self, point: int) -> int:
        return next(iter(self._profile.values()))[point][0]

    def _note_memory(self, chosen: Shape) -> None:
        shape = (self._wanted(2), *next(iter(self._at(self._last).values()))[1:])
        if chosen != shape:
            nbytes = self._nbytes(self._elements(self._last)) * shape[0] // self._least
            self._notes.append(
                f"compared at {_text(chosen)}, not {_text(shape)}, whose outputs take "
                f"{_gigabytes(nbytes)}: {_gigabytes(self._limit)} may be used here"
            )

    def _seconds(self, step: int) -> float:
        return self._cost(step).seconds / self._least

    def _rows_per_pass(self, step: int, most: int) -> int | None:
        cost = self._cost(step)
        each, seconds = cost.elements / self._least, WIDE * self._seconds(step)
        rows = int(max(1, min(PASS_ELEMENTS / max(each, 1), PASS_SECONDS / max(seconds, 1e-9))))
        if rows >= most or not self._trial.rows_are_independent(self._at(min(step, _BRIEF))):
            return None
        return rows

    def _text(self, step: int) -> str:
        return _text(next(iter(self._at(step).values())))


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2g} GB"
