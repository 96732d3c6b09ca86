"""Ask a model which sizes of an axis it takes: those of a profile, and those to trace with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kilodelta.errors import InputError, KiloDeltaError, one_line
from kilodelta.export.manifest.facts import BATCH, Sizes
from kilodelta.export.onnx.axes.labels import image_axis
from kilodelta.export.onnx.axes.variation import AxisGroup, Place, resize
from kilodelta.models import Batch, LoadedModel
from kilodelta.models.quiet import quiet

LONGEST = 512
"""Tokens that a profile goes up to by default: activations of the largest shape take memory."""
TRACED_ROWS, TRACED_TOKENS = 3, (19, 13, 11, 7)
"""Sizes to trace with: more than one, and unlike each other and usual sizes, so that nothing looks
constant or equal that is not, and no branch for a special size is taken."""


@dataclass
class SizeProbe:
    """Runs one model at other sizes of its inputs' axes.

    Attributes:
        loaded: the model.
        batch: inputs that it takes, of as few rows as it does.
        by_hand: smallest, usual and largest sizes of axes by name, as the user gave them.
        problem: why the model refused the last time.
    """

    loaded: LoadedModel
    batch: Batch
    by_hand: Mapping[str, Sizes]
    problem: str = ""

    @property
    def model_name(self) -> str:
        """The class of the model's module, which messages name."""
        return type(self.loaded.module).__name__

    def takes(self, sizes: Mapping[Place, int]) -> bool:
        """Return whether the model computes with these axes at these sizes, the others as shown."""
        try:
            with torch.no_grad(), quiet():
                self.loaded.view()(**resize(self.batch, sizes))
        except KiloDeltaError:
            raise
        except Exception as error:  # a module's own code may raise anything
            self.problem = one_line(error)
            return False
        return True

    def takes_at(self, places: Sequence[Place], size: int) -> bool:
        """Return whether the model computes with all of these axes at one size."""
        return self.takes(dict.fromkeys(places, size))

    def size(self, place: Place) -> int:
        """Return an axis's size in the batch."""
        return int(self.batch[place[0]].shape[place[1]])

    def alternatives(self, place: Place) -> tuple[int, ...]:
        """List other sizes to try: one more; then such as suit patches and chunks."""
        size = self.size(place)
        label = image_axis(self.batch[place[0]], place[1])
        by_hand = self.by_hand.get(label) if label is not None else None
        wanted = (size + 1, 2 * size, size // 2) if by_hand is None else by_hand[::-1]
        return tuple(dict.fromkeys(n for n in wanted if n not in (0, size)))

    def token_sizes(self, places: Sequence[Place], given: int, other: int) -> Sizes:
        """Find the sizes from one token to the longest text, at most `LONGEST`, that it takes.

        Args:
            places: the axes of tokens.
            given: their size in the batch.
            other: another size that the model takes.
        """
        low = next((n for n in (1, 2) if self.takes_at(places, n)), min(given, other))
        top = min(self.loaded.max_length or LONGEST, LONGEST)
        taken = max(given, other)
        if taken < top and not self.takes_at(places, top):
            while top - taken > 1:  # known is taken, top is not
                middle = (taken + top) // 2
                taken, top = (middle, top) if self.takes_at(places, middle) else (taken, middle)
            top = taken
        top = max(top, taken if taken <= top else given)
        return low, min(64, top), top

    def near_sizes(self, places: Sequence[Place], given: int) -> Sizes:
        """Return the size shown, and half and twice of it where the model takes them."""
        low = given // 2 if given > 1 and self.takes_at(places, given // 2) else given
        return low, given, 2 * given if self.takes_at(places, 2 * given) else given

    def requested(self, name: str, places: Sequence[Place], default: Sizes) -> Sizes:
        """Return the sizes by hand where there are any.

        Args:
            name: of the axis.
            places: where it occurs.
            default: its sizes otherwise.

        Raises:
            InputError: the model does not take one of them.
        """
        sizes = self.by_hand.get(name, default)
        if name in self.by_hand and name != BATCH:
            for size in dict.fromkeys(sizes):
                if not self.takes_at(places, size):
                    raise InputError(
                        f"{self.model_name} does not take {name} {size}: {self.problem}",
                        fix=f"give other sizes, such as {name}={','.join(map(str, default))}",
                    )
        return sizes


def traceable(probe: SizeProbe, named: Sequence[AxisGroup]) -> tuple[AxisGroup, ...]:
    """Return the groups at sizes to trace with that the model takes together."""
    groups = tuple(_distinct(probe, named))
    if probe.takes({place: g.traced for g in groups for place in g.places}):
        return groups
    return tuple(
        group if group.name == BATCH else replace(group, traced=group.given) for group in groups
    )


def _distinct(probe: SizeProbe, named: Sequence[AxisGroup]) -> Iterator[AxisGroup]:
    """Yield the groups, no two traced at one size where the model takes another."""
    used: set[int] = set()
    for group in named:
        if group.traced in used and group.name != BATCH:
            wanted = (*TRACED_TOKENS, group.traced + 1, *group.sizes, group.given)
            fits = (n for n in wanted if n not in used and n <= group.sizes[2])
            traced = next((n for n in fits if probe.takes_at(group.places, n)), group.traced)
            group = replace(group, traced=traced)
        used.add(group.traced)
        yield group
