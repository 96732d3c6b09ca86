"""Find which axes of a model's inputs may vary, by asking the model, and name them.

A declared axis that the model does not take is worse than a fixed one. So the module itself is run
at other sizes: an axis varies if it computes then, and axes that it only takes together, such as
those of token ids and their mask, share one name. What the exported graph makes of it is tried
afterwards (`trial.py`).

=====================  ==========================================================================
 `batch`                the first axis of every input
 `sequence`             tokens of the main input, its mask and its like
 `decoder_sequence`     tokens of `decoder_input_ids`
 `NAME_sequence`        tokens of a further input NAME that need not be as long
 `time`                 the axis of a float input that varies, such as samples or frames of sound
 `NAME_INDEX`           any further axis that varies
 `height`, `width`      of images, where `--profile` names them; `frames` of videos likewise
=====================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice

import torch
from torch import Tensor

from kilodelta.errors import InputError, KiloDeltaError
from kilodelta.export.manifest.facts import BATCH, SEQUENCE, Sizes
from kilodelta.models import Batch, LoadedModel
from kilodelta.models.quiet import quiet

LONGEST = 512
"""Tokens that a profile goes up to by default: activations of the largest shape take memory."""

Place = tuple[str, int]
"""An input's name and the index of one of its axes."""

_TRACED_ROWS, _TRACED_TOKENS = 3, (19, 13, 11, 7)
"""Sizes to trace with: more than one, and unlike each other and usual sizes, so that nothing looks
constant or equal that is not, and no branch for a special size is taken."""
_SIDES = ("height", "width")
_MOST_TIES = 64
"""Sets of axes that are tried for one axis: enough for four inputs that go together."""


@dataclass(frozen=True, kw_only=True)
class AxisGroup:
    """Axes that vary together under one name.

    Attributes:
        name: of the axis, in the ONNX file and in profiles.
        places: where it occurs.
        given: its size in the batch that was shown.
        traced: its size while the graph is traced.
        sizes: smallest, usual and largest size to use it at; the model takes all three.
    """

    name: str
    places: tuple[Place, ...]
    given: int
    traced: int
    sizes: Sizes


@dataclass(frozen=True, kw_only=True)
class Variation:
    """What may vary in a batch, and what is fixed although one might expect otherwise."""

    batch: Batch
    groups: tuple[AxisGroup, ...]
    fixed: tuple[str, ...] = ()
    """Sentences."""

    def axes(self) -> dict[str, dict[int, str]]:
        """Return the names of the axes that vary, by input and index."""
        named: dict[str, dict[int, str]] = {name: {} for name in self.batch}
        for group in self.groups:
            for name, index in group.places:
                named[name][index] = group.name
        return named

    def group(self, name: str) -> AxisGroup:
        """Return the group of an axis's name."""
        return next(group for group in self.groups if group.name == name)

    def retraced(self, name: str, size: int) -> Variation:
        """Return the same with one axis traced at another size."""
        groups = (replace(g, traced=size) if g.name == name else g for g in self.groups)
        return replace(self, groups=tuple(groups))

    def fix(self, name: str, size: int, reason: str) -> Variation:
        """Return the same with one axis fixed at a size."""
        return Variation(
            batch=self.resized({name: size}),
            groups=tuple(group for group in self.groups if group.name != name),
            fixed=(*self.fixed, f"{name} is fixed at {size}: {reason}"),
        )

    def resized(self, sizes: Mapping[str, int]) -> Batch:
        """Return the batch with some of its axes, by name, at other sizes."""
        moved = {p: sizes[g.name] for g in self.groups if g.name in sizes for p in g.places}
        return resize(self.batch, moved)


def resize(batch: Batch, sizes: Mapping[Place, int]) -> Batch:
    """Cut axes, or repeat what they hold, to other sizes; every tensor is a new one."""
    made = {name: tensor.clone() for name, tensor in batch.items()}
    for (name, axis), size in sizes.items():
        index = torch.arange(size) % made[name].shape[axis]
        made[name] = made[name].index_select(axis, index)
    return made


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
    return _Search(loaded, batch, by_hand).run()


@dataclass
class _Search:
    """The questions to one model about one batch."""

    loaded: LoadedModel
    shown: Batch
    by_hand: Mapping[str, Sizes]
    groups: list[AxisGroup] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)
    problem: str = ""
    """Why the model refused the last time."""

    def run(self) -> Variation:
        self.batch = self.shown  # what questions are asked of: as few rows as the model takes
        self._rows()
        free = list(self._candidates())
        while free:
            tied = self._tied(free[0], free)
            if tied is None:
                free.pop(0)
                continue
            self._add(*tied)
            free = [place for place in free if place not in tied[0]]
        for name in sorted(set(self.by_hand) - {group.name for group in self.groups}):
            self._refuse(name)
        self._note_images()
        return Variation(batch=self.shown, groups=self._traceable(), fixed=tuple(self.fixed))

    def takes(self, sizes: Mapping[Place, int]) -> bool:
        """Return whether the model computes with these axes at these sizes, the others as shown."""
        try:
            with torch.no_grad(), quiet():
                self.loaded.view()(**resize(self.batch, sizes))
        except KiloDeltaError:
            raise
        except Exception as error:  # a module's own code may raise anything
            lines = (line.strip() for line in str(error).splitlines())
            self.problem = next((line for line in lines if line), type(error).__name__)
            return False
        return True

    def _rows(self) -> None:
        """Settle the batch axis; everything else is then asked of few rows."""
        places = tuple((name, 0) for name, tensor in self.batch.items() if tensor.ndim)
        given = max((len(self.batch[name]) for name, _ in places), default=1)
        at = {n: dict.fromkeys(places, n) for n in (1, 2, _TRACED_ROWS, given)}
        if self.takes(at[_TRACED_ROWS]) and self.takes(at[2]):
            low = 1 if self.takes(at[1]) else 2
            sizes = self._asked(BATCH, places, (low, 8, 32))
            self.groups.append(
                AxisGroup(name=BATCH, places=places, given=given, traced=_TRACED_ROWS, sizes=sizes)
            )
            self.batch = resize(self.shown, at[low])
            return
        rows = next((n for n in (given, 1) if self.takes(at[n])), None)
        if rows is None:
            shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in self.batch.items())
            raise InputError(
                f"{self._model} does not compute with {shapes}: {self.problem}",
                fix="give inputs that it takes",
            )
        self.fixed.append(f"batch is {rows}: the model takes no other number of rows")
        self.shown = self.batch = resize(self.shown, at[rows])

    @property
    def _model(self) -> str:
        return type(self.loaded.module).__name__

    def _candidates(self) -> Iterator[Place]:
        """Axes that might vary, those of the main inputs first."""
        order = sorted(self.batch, key=lambda name: name != "input_ids")
        for name in order:
            tensor = self.batch[name]
            for axis in range(1, tensor.ndim):
                label = _image_axis(tensor, axis)
                if label is None or label in self.by_hand:
                    yield name, axis

    def _tied(self, place: Place, free: Sequence[Place]) -> tuple[tuple[Place, ...], int] | None:
        """Find the axes that vary with `place`, and another size that the model takes; or None."""
        size = self._size(place)
        others = [p for p in free if p != place and self._size(p) == size and p[0] != place[0]]
        kin = tuple(p for p in others if _family(p[0]) == _family(place[0]) is not None)
        sets = (set_ for count in range(len(others) + 1) for set_ in combinations(others, count))
        # Axes of one family go together even where the model would take them apart.
        chosen = (set_ for set_ in sets if set(kin) <= set(set_))
        for set_ in islice(chosen, _MOST_TIES):
            together = (place, *set_)
            for other in self._alternatives(place):
                if self.takes(dict.fromkeys(together, other)):
                    return together, other
        return None

    def _size(self, place: Place) -> int:
        return int(self.batch[place[0]].shape[place[1]])

    def _alternatives(self, place: Place) -> tuple[int, ...]:
        """List other sizes to try: one more; then such as suit patches and chunks."""
        size = self._size(place)
        label = _image_axis(self.batch[place[0]], place[1])
        by_hand = self.by_hand.get(label) if label is not None else None
        wanted = (size + 1, 2 * size, size // 2) if by_hand is None else by_hand[::-1]
        return tuple(dict.fromkeys(n for n in wanted if n not in (0, size)))

    def _add(self, places: tuple[Place, ...], other: int) -> None:
        name, given = self._name(places), self._size(places[0])
        is_tokens = name.endswith(SEQUENCE)
        sizes = self._tokens(places, given, other) if is_tokens else self._near(places, given)
        sizes = self._asked(name, places, sizes)
        wanted = [n for n in _TRACED_TOKENS if n <= sizes[2]] if is_tokens else [other]
        traced = next((n for n in wanted if self._at(places, n)), given)
        self.groups.append(
            AxisGroup(name=name, places=places, given=given, traced=traced, sizes=sizes)
        )

    def _name(self, places: Sequence[Place]) -> str:
        first, axis = places[0]
        taken = {group.name for group in self.groups}
        label = _image_axis(self.batch[first], axis)
        tensors = [self.batch[name] for name, _ in places]
        if label is None:
            if any(t.is_floating_point() for t in tensors):
                label = "time"
            else:
                label = f"decoder_{SEQUENCE}" if first.startswith("decoder_") else SEQUENCE
                label = label if label not in taken else f"{first}_{SEQUENCE}"
        return label if label not in taken else f"{first}_{axis}"

    def _at(self, places: Sequence[Place], size: int) -> bool:
        return self.takes(dict.fromkeys(places, size))

    def _tokens(self, places: Sequence[Place], given: int, other: int) -> Sizes:
        """Find the sizes from one token to the longest text, at most `LONGEST`, that it takes."""
        low = next((n for n in (1, 2) if self._at(places, n)), min(given, other))
        top = min(self.loaded.max_length or LONGEST, LONGEST)
        taken = max(given, other)
        if taken < top and not self._at(places, top):
            while top - taken > 1:  # known is taken, top is not
                middle = (taken + top) // 2
                taken, top = (middle, top) if self._at(places, middle) else (taken, middle)
            top = taken
        top = max(top, taken if taken <= top else given)
        return low, min(64, top), top

    def _near(self, places: Sequence[Place], given: int) -> Sizes:
        """Return the size shown, and half and twice of it where the model takes them."""
        low = given // 2 if given > 1 and self._at(places, given // 2) else given
        return low, given, 2 * given if self._at(places, 2 * given) else given

    def _asked(self, name: str, places: Sequence[Place], default: Sizes) -> Sizes:
        """Sizes by hand where there are any.

        Raises:
            InputError: the model does not take one of them.
        """
        sizes = self.by_hand.get(name, default)
        if name in self.by_hand and name != BATCH:
            for size in dict.fromkeys(sizes):
                if not self._at(places, size):
                    raise InputError(
                        f"{self._model} does not take {name} {size}: {self.problem}",
                        fix=f"give other sizes, such as {name}={','.join(map(str, default))}",
                    )
        return sizes

    def _refuse(self, name: str) -> None:
        """Say why a name given by hand is that of no axis that varies.

        Raises:
            InputError: always, but for a batch of the one size that the model takes.
        """
        known = ", ".join(group.name for group in self.groups) or "none"
        if name == BATCH:
            rows = len(next(iter(self.batch.values())))
            if self.by_hand[name] == (rows, rows, rows):
                return
            raise InputError(
                f"{self._model} takes {rows} {'row' if rows == 1 else 'rows'} and no other number",
                fix=f"leave {BATCH} out of --profile",
            )
        for image, tensor in self.batch.items():
            if name in _image_labels(tensor):
                place = image, _image_labels(tensor).index(name)
                for size in self._alternatives(place):
                    self.takes({place: size})  # for what the model says
                raise InputError(
                    f"{self._model} takes {image} of no other {name}: {self.problem}",
                    fix=f"leave {name} out of --profile",
                )
        raise InputError(
            f"no input has an axis {name} that varies", fix=f"the axes that vary are {known}"
        )

    def _note_images(self) -> None:
        """Say of images that could vary in size how they are made to."""
        for name, tensor in self.batch.items():
            labels = _image_labels(tensor)
            free = [i for i, x in enumerate(labels) if x in _SIDES and x not in self.by_hand]
            if free and self.takes({(name, axis): self._size((name, axis)) + 32 for axis in free}):
                stated = " and ".join(f"{labels[i]} {tensor.shape[i]}" for i in free)
                self.fixed.append(
                    f"{name} is fixed at {stated}; --profile {labels[free[0]]}=MIN,OPT,MAX lets "
                    "it vary"
                )

    def _traceable(self) -> tuple[AxisGroup, ...]:
        """Return the groups at sizes to trace with that the model takes together."""
        groups = tuple(self._distinct())
        if self.takes({place: g.traced for g in groups for place in g.places}):
            return groups
        return tuple(
            group if group.name == BATCH else replace(group, traced=group.given) for group in groups
        )

    def _distinct(self) -> Iterator[AxisGroup]:
        """Yield the groups, no two traced at one size where the model takes another."""
        used: set[int] = set()
        for group in self.groups:
            if group.traced in used and group.name != BATCH:
                wanted = (*_TRACED_TOKENS, group.traced + 1, *group.sizes, group.given)
                fits = (n for n in wanted if n not in used and n <= group.sizes[2])
                traced = next((n for n in fits if self._at(group.places, n)), group.traced)
                group = replace(group, traced=traced)
            used.add(group.traced)
            yield group


def _family(name: str) -> str | None:
    """Name the text that an input describes token by token, by the names of tokenizers."""
    stem = name.removeprefix("decoder_")
    if stem in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
        return "decoder" if stem != name else "text"
    return None


def _image_labels(tensor: Tensor) -> tuple[str, ...]:
    """Name the axes of images (batch, channels, height, width) and of videos with one more."""
    if not tensor.is_floating_point() or tensor.ndim not in (4, 5):
        return ()
    if tensor.ndim == 4:
        return ("", "", *_SIDES)
    channels_first = tensor.shape[1] in (1, 3) and tensor.shape[2] not in (1, 3)
    return ("", "", "frames", *_SIDES) if channels_first else ("", "frames", "", *_SIDES)


def _image_axis(tensor: Tensor, axis: int) -> str | None:
    """Name an image's axis, empty for its channels; None for an axis of no image."""
    labels = _image_labels(tensor)
    return labels[axis] if labels else None
