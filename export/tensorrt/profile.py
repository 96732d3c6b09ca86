"""Make optimisation profiles: the sizes of its axes at which a model will be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kilodelta.errors import InputError
from kilodelta.export.manifest.facts import Port, Profile, Shape, Sizes
from kilodelta.models import LoadedModel
from kilodelta.models.example_inputs import BATCH, SEQUENCE

LONGEST = 512
"""Tokens that a profile goes up to by default: activations of the largest shape take memory."""


def profile_for(
    loaded: LoadedModel, inputs: Sequence[Port], by_hand: Mapping[str, Sizes]
) -> Profile:
    """Return the shapes of every input: by hand where its axis is named, else from the model.

    Args:
        loaded: the model, for its largest number of tokens.
        inputs: of the graph, with the names of axes that vary.
        by_hand: smallest, usual and largest size by axis.

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
