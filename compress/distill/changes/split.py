"""Decide how each change travels: as coefficients, stored whole, or not at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from kilodelta.compress.distill.changes.compare import Change
from kilodelta.compress.distill.changes.structure import Structure
from kilodelta.errors import InputError
from kilodelta.files import dtypes
from kilodelta.format.targets import matches

POLICIES = ("auto", "all", "none")


@dataclass(frozen=True, kw_only=True)
class Split:
    """The changes by how they travel.

    Attributes:
        targets: matrices that coefficients change.
        extras: tensors that are stored whole.
        dropped: changed tensors that the file does not carry.
    """

    targets: tuple[Change, ...]
    extras: tuple[Change, ...]
    dropped: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a user asked for.

    Attributes:
        targets: globs of matrices to change; empty means every changed matrix of a layer.
        exclude: globs of tensors to leave alone: neither changed nor stored.
        extras: `auto` stores what coefficients cannot carry and no training makes up for (tensors
            that are new or of another shape or kind, and running statistics), `all` stores every
            other change as well, `none` stores nothing, and anything else is globs, joined by
            commas, of tensors to store on top of `auto`.
    """

    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    extras: str = "auto"


def split(
    changes: Sequence[Change],
    wishes: Wishes,
    structure: Structure,
    *,
    names: Collection[str],
    ties: Mapping[str, tuple[str, ...]],
) -> Split:
    """Sort the changes by how they travel.

    Args:
        changes: what differs, from `compare`.
        wishes: what the user asked for.
        structure: what the base's tensors are.
        names: all tensors of both models, to find patterns that match nothing.
        ties: for each name of a tied matrix that the base stores more than once: all its names.
            They change together or not at all.

    Raises:
        InputError: a pattern matches nothing, nothing is left to be a target, a chosen target has
            no place in the module, tied tensors are torn apart, or extras are targets.
    """
    _check_patterns(wishes, names)
    chosen = {c.name for c in changes if c.is_matrix and _is_target(c.name, wishes, structure)}
    chosen |= {name for c in changes for name in ties.get(c.name, ()) if c.name in chosen}
    _check_ties(chosen, wishes, ties)
    if not chosen:
        raise _nothing_left(changes, wishes)
    _check_places(chosen, structure)
    rest = [change for change in changes if change.name not in chosen]
    _check_extras(wishes, chosen, rest)
    whole = {change.name for change in rest if _is_extra(change, wishes, structure)}
    return Split(
        targets=tuple(change for change in changes if change.name in chosen),
        extras=tuple(change for change in rest if change.name in whole),
        dropped=tuple(change for change in rest if change.name not in whole),
    )


def _is_target(name: str, wishes: Wishes, structure: Structure) -> bool:
    if matches(name, wishes.exclude):
        return False
    return matches(name, wishes.targets) if wishes.targets else name in structure.layers


def _is_extra(change: Change, wishes: Wishes, structure: Structure) -> bool:
    if wishes.extras == "none" or matches(change.name, wishes.exclude):
        return False
    if change.is_new or wishes.extras == "all":
        return True
    if change.name in structure.buffers or change.dtype not in dtypes.TARGETS | {"F64"}:
        return True
    return wishes.extras != "auto" and matches(change.name, wishes.extras.split(","))


def _check_patterns(wishes: Wishes, names: Collection[str]) -> None:
    """Refuse a pattern that matches no tensor: it is a slip, and would be ignored in silence."""
    extras = () if wishes.extras in POLICIES else tuple(wishes.extras.split(","))
    for option, globs in (
        ("--targets", wishes.targets),
        ("--exclude", wishes.exclude),
        ("--extras", extras),
    ):
        for glob in globs:
            if not any(matches(name, (glob,)) for name in names):
                near = get_close_matches(glob, list(names), n=3, cutoff=0.3) or sorted(names)[:3]
                raise InputError(
                    f"{option} {glob!r} matches no tensor of the models",
                    fix=f"patterns match whole names, such as {', '.join(near)}",
                )


def _check_extras(wishes: Wishes, chosen: Collection[str], rest: Sequence[Change]) -> None:
    """Refuse a pattern that names targets alone, which are not stored whole."""
    for glob in () if wishes.extras in POLICIES else wishes.extras.split(","):
        named = sorted(name for name in chosen if matches(name, (glob,)))
        if named and not any(matches(change.name, (glob,)) for change in rest):
            raise InputError(
                f"--extras {glob!r} names what coefficients change, such as {named[0]}",
                fix="leave it out; or, to store these whole, name the others by --targets",
            )


def _check_ties(
    chosen: Collection[str], wishes: Wishes, ties: Mapping[str, tuple[str, ...]]
) -> None:
    for name in sorted(name for name in chosen if not matches(name, wishes.exclude)):
        for other in ties.get(name, ()):
            if matches(other, wishes.exclude):
                raise InputError(
                    f"{name} and {other} are one tied tensor, which the base stores twice:"
                    f" {other} cannot be left alone while {name} changes",
                    fix=f"exclude both, or neither: --exclude {name!r}",
                )


def _check_places(chosen: Collection[str], structure: Structure) -> None:
    if structure.placed is None:
        return
    homeless = sorted(name for name in chosen if name not in structure.placed)
    if homeless:
        raise InputError(
            f"{homeless[0]} has no place in the module, so no input can train an update of it"
            + (f" ({len(homeless)} such tensors)" if len(homeless) > 1 else ""),
            fix=f"leave it alone with --exclude {homeless[0]!r}, or without --inputs fit it to the"
            " weights by --method lora",
        )


def _nothing_left(changes: Sequence[Change], wishes: Wishes) -> InputError:
    matrices = [change.name for change in changes if change.is_matrix]
    if not matrices:
        new = [change.name for change in changes if change.is_new]
        listed = ", ".join((new or [change.name for change in changes])[:3])
        what = f"no matrix that both models have changed; what differs is {listed}"
        return InputError(
            what, fix="give a fine-tune whose layers were trained, not its head alone"
        )
    asked = "--targets and --exclude leave" if wishes.targets or wishes.exclude else "there is"
    return InputError(
        f"{asked} no changed matrix to compress; {len(matrices)} changed, such as {matrices[0]}",
        fix="name them with --targets, or loosen --exclude; see kilodelta digest --tensors",
    )
