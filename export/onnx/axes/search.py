"""Search a batch for the axes that vary, and for those that vary together only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice

from kilodelta.errors import InputError
from kilodelta.export.manifest.facts import BATCH, SEQUENCE, Sizes
from kilodelta.export.onnx.axes.labels import SIDES, axis_name, family, image_axis, image_labels
from kilodelta.export.onnx.axes.sizes import TRACED_ROWS, TRACED_TOKENS, SizeProbe, traceable
from kilodelta.export.onnx.axes.variation import AxisGroup, Place, Variation, resize
from kilodelta.models import Batch, LoadedModel

_MOST_TIES = 64
"""Sets of axes that are tried for one axis: enough for four inputs that go together."""


def vary(loaded: LoadedModel, batch: Batch, by_hand: Mapping[str, Sizes]) -> Variation:
    """Find what may vary in a batch.

    Args:
        loaded: the model to ask.
        batch: inputs that it takes.
        by_hand: smallest, usual and largest sizes of axes by name, as the user gave them.

    Raises:
        InputError: the model does not compute with the batch, or not at a size given by hand; or
            a name given by hand is none of an axis that varies.
    """
    return _Search(SizeProbe(loaded, batch, by_hand), batch).run()


@dataclass
class _Search:
    """The questions to one model about one batch; the probe asks them of as few rows as can be."""

    probe: SizeProbe
    shown: Batch
    groups: list[AxisGroup] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)

    def run(self) -> Variation:
        self._rows()
        free = list(self._candidates())
        while free:
            tied = self._tied(free[0], free)
            if tied is None:
                free.pop(0)
                continue
            self._add(*tied)
            free = [place for place in free if place not in tied[0]]
        for name in sorted(set(self.probe.by_hand) - {group.name for group in self.groups}):
            self._refuse(name)
        self._note_images()
        return Variation(
            batch=self.shown, groups=traceable(self.probe, self.groups), fixed=tuple(self.fixed)
        )

    def _rows(self) -> None:
        """Settle the batch axis; everything else is then asked of few rows."""
        places = tuple((name, 0) for name, tensor in self.probe.batch.items() if tensor.ndim)
        given = max((len(self.probe.batch[name]) for name, _ in places), default=1)
        at = {n: dict.fromkeys(places, n) for n in (1, 2, TRACED_ROWS, given)}
        if self.probe.takes(at[TRACED_ROWS]) and self.probe.takes(at[2]):
            low = 1 if self.probe.takes(at[1]) else 2
            sizes = self.probe.requested(BATCH, places, (low, 8, 32))
            self.groups.append(
                AxisGroup(name=BATCH, places=places, given=given, traced=TRACED_ROWS, sizes=sizes)
            )
            self.probe.batch = resize(self.shown, at[low])
            return
        rows = next((n for n in (given, 1) if self.probe.takes(at[n])), None)
        if rows is None:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in self.probe.batch.items())
            raise InputError(
                f"{self.probe.model_name} does not compute with {shapes}: {self.probe.problem}",
                fix="give inputs that it takes",
            )
        self.fixed.append(f"batch is {rows}: the model takes no other number of rows")
        self.shown = self.probe.batch = resize(self.shown, at[rows])

    def _candidates(self) -> Iterator[Place]:
        """Yield the axes that might vary, those of the main inputs first."""
        order = sorted(self.probe.batch, key=lambda name: name != "input_ids")
        for name in order:
            tensor = self.probe.batch[name]
            for axis in range(1, tensor.ndim):
                label = image_axis(tensor, axis)
                if label is None or label in self.probe.by_hand:
                    yield name, axis

    def _tied(self, place: Place, free: Sequence[Place]) -> tuple[tuple[Place, ...], int] | None:
        """Find the axes that vary with `place`, and another size that the model takes; or None."""
        size = self.probe.size(place)
        others = [p for p in free if p != place and self.probe.size(p) == size and p[0] != place[0]]
        kin = tuple(p for p in others if family(p[0]) == family(place[0]) is not None)
        sets = (set_ for count in range(len(others) + 1) for set_ in combinations(others, count))
        # Axes of one family go together even where the model would take them apart.
        chosen = (set_ for set_ in sets if set(kin) <= set(set_))
        for set_ in islice(chosen, _MOST_TIES):
            together = (place, *set_)
            for other in self.probe.alternatives(place):
                if self.probe.takes(dict.fromkeys(together, other)):
                    return together, other
        return None

    def _add(self, places: tuple[Place, ...], other: int) -> None:
        probe, given = self.probe, self.probe.size(places[0])
        name = axis_name(probe.batch, places, {group.name for group in self.groups})
        if is_tokens := name.endswith(SEQUENCE):
            sizes = probe.token_sizes(places, given, other)
        else:
            sizes = probe.near_sizes(places, given)
        sizes = probe.requested(name, places, sizes)
        wanted = [n for n in TRACED_TOKENS if n <= sizes[2]] if is_tokens else [other]
        traced = next((n for n in wanted if probe.takes_at(places, n)), given)
        self.groups.append(
            AxisGroup(name=name, places=places, given=given, traced=traced, sizes=sizes)
        )

    def _refuse(self, name: str) -> None:
        """Say why a name given by hand is that of no axis that varies.

        Raises:
            InputError: always, but for a batch of the one size that the model takes.
        """
        known = ", ".join(group.name for group in self.groups) or "none"
        if name == BATCH:
            rows = len(next(iter(self.probe.batch.values())))
            if self.probe.by_hand[name] == (rows, rows, rows):
                return
            raise InputError(
                f"{self.probe.model_name} takes {rows} {'row' if rows == 1 else 'rows'}"
                " and no other number",
                fix=f"leave {BATCH} out of --profile",
            )
        for image, tensor in self.probe.batch.items():
            if name in image_labels(tensor):
                place = image, image_labels(tensor).index(name)
                for size in self.probe.alternatives(place):
                    self.probe.takes({place: size})  # for what the model says
                raise InputError(
                    f"{self.probe.model_name} takes {image} of no other {name}:"
                    f" {self.probe.problem}",
                    fix=f"leave {name} out of --profile",
                )
        raise InputError(
            f"no input has an axis {name} that varies", fix=f"the axes that vary are {known}"
        )

    def _note_images(self) -> None:
        """Say of images that could vary in size how they are made to."""
        for name, tensor in self.probe.batch.items():
            labels = image_labels(tensor)
            free = [i for i, x in enumerate(labels) if x in SIDES and x not in self.probe.by_hand]
            larger = {(name, axis): tensor.shape[axis] + 32 for axis in free}
            if free and self.probe.takes(larger):
                stated = " and ".join(f"{labels[i]} {tensor.shape[i]}" for i in free)
                self.fixed.append(
                    f"{name} is fixed at {stated}; --profile {labels[free[0]]}=MIN,OPT,MAX lets "
                    "it vary"
                )
