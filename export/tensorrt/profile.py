"""Optimisation profiles: at which sizes of its axes a model will be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kilodelta.errors import InputError
from kilodelta.export.manifest.facts import Port, Profile, Shape, Sizes
from kilodelta.models import LoadedModel
from kilodelta.models.example_inputs import BATCH, SEQUENCE

LONGEST = 512
"""Tokens that a profile goes up to by default: activations of the largest shape take memory."""

_MOST = (1 << 31) - 1  # TensorRT counts in 32 bits where a shape is an index


def read_sizes(texts: Sequence[str]) -> dict[str, Sizes]:
    """Sizes of axes as a user writes them: `batch=1,8,32`.

    Raises:
        InputError: a text of another form, or sizes that do not rise.
    """
    found: dict[str, Sizes] = {}
    for text in texts:
        name, _, numbers = text.partition("=")
        sizes = tuple(int(n) if n.isdecimal() else 0 for n in numbers.split(","))
        rises = len(sizes) == 3 and 1 <= sizes[0] <= sizes[1] <= sizes[2] <= _MOST
        if not rises or name in found:
            raise InputError(
                f"{text!r} is no profile of an axis",
                fix="give each axis once, as in batch=1,8,32: smallest, usual, largest",
            )
        found[name] = (sizes[0], sizes[1], sizes[2])
    return found


def profile_for(
    loaded: LoadedModel, inputs: Sequence[Port], by_hand: Mapping[str, Sizes]
) -> Profile:
    """The shapes of every input: by hand where an axis is named there, else from the model.

    Raises:
        InputError: an axis that no input has, or more tokens than the model has positions.
    """
    named = {axis for port in inputs for axis in port.shape if isinstance(axis, str)}
    unknown = sorted(set(by_hand) - named)
    if unknown:
        raise InputError(
            f"no input has an axis {', '.join(unknown)} that varies",
            fix=f"the axes are {', '.join(sorted(named)) or 'all fixed'}",
        )
    _check_positions(loaded, by_hand)
    sizes = {**_usual(loaded), **by_hand}
    return {port.name: _shapes(port, sizes) for port in inputs}


def _usual(loaded: LoadedModel) -> dict[str, Sizes]:
    top = min(loaded.max_length or LONGEST, LONGEST)
    return {BATCH: (1, 8, 32), SEQUENCE: (1, min(64, top), top)}


def _check_positions(loaded: LoadedModel, by_hand: Mapping[str, Sizes]) -> None:
    positions = getattr(getattr(loaded.module, "config", None), "max_position_embeddings", None)
    wanted = by_hand.get(SEQUENCE, (0, 0, 0))[2]
    if isinstance(positions, int) and wanted > positions:
        raise InputError(
            f"the profile goes to {wanted} tokens, the model has {positions} positions",
            fix=f"give at most {SEQUENCE}=...,{positions}",
        )


def _shapes(port: Port, sizes: Mapping[str, Sizes]) -> tuple[Shape, Shape, Shape]:
    def at(point: int) -> Shape:
        return tuple(sizes[axis][point] if isinstance(axis, str) else axis for axis in port.shape)

    return at(0), at(1), at(2)
