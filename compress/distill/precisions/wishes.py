"""Say in which precisions a file is to be good, and refuse what makes no sense; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from kilodelta.errors import InputError
from kilodelta.grid.precisions import PRECISIONS

IN_GRID, BESIDE = "in-grid", "beside"
WAYS = (IN_GRID, BESIDE)
"""What a file for a quantised base can be asked for: the two ways to apply it."""
FLOATS = ("fp32", "fp16")
CHOICES = (*WAYS, *FLOATS, *PRECISIONS)


def beside(precision: str) -> str:
    """Name the measure of an update beside a base quantised so.

    Example:
        >>> beside("int4-g32")
        'int4-g32.beside'
    """
    return f"{precision}.{BESIDE}"


def parse_for(text: str | None) -> tuple[str, ...]:
    """Split what a user types after `--for`.

    Example:
        >>> parse_for("beside, in-grid")
        ('beside', 'in-grid')
    """
    return () if text is None else tuple(part.strip() for part in text.split(","))


def check_for(asked: Sequence[str], *, learns: bool) -> None:
    """Check what `--for` names, before any model is opened.

    Args:
        asked: names, as a user gave them.
        learns: whether there are inputs to measure on.

    Raises:
        InputError: a name is none or comes twice, ways and precisions are mixed, or there are no
            inputs.
    """
    for name in asked:
        if name not in CHOICES:
            raise InputError(
                f"{name!r:.80} is no precision that a file can be made for",
                fix=f"--for takes {', '.join(CHOICES)}, joined by commas",
            )
        if asked.count(name) > 1:
            raise InputError(f"--for names {name} twice", fix="name it once")
    ways = [name for name in asked if name in WAYS]
    if ways and len(ways) < len(asked):
        other = next(name for name in asked if name not in WAYS)
        raise InputError(
            f"{ways[0]} is a way to apply a file to a quantised base, {other} a precision of a"
            " float one",
            fix="ask for ways or for precisions, as BASE is",
        )
    if asked and not learns:
        raise InputError("--for is trained and measured on inputs", fix="give --inputs")


def settled(asked: tuple[str, ...], kinds: tuple[str, ...] | None, base: object) -> tuple[str, ...]:
    """Check `--for` against the base; for a quantised one both ways are asked for by default.

    Args:
        asked: what passed `check_for`.
        kinds: the layouts of the base's codes; None for a float base.
        base: its place, for the error.

    Raises:
        InputError: the base is quantised and precisions are named, or float and ways are.

    Example:
        >>> settled((), ("pack-quantized",), "base/")
        ('in-grid', 'beside')
    """
    if kinds is None:
        for name in asked:
            if name in WAYS:
                raise InputError(
                    f"{base} is a float model, and {name} is a way to apply a file to a quantised"
                    " one",
                    fix=f"name precisions, such as --for {', '.join(PRECISIONS)}, or give the"
                    " quantised model as BASE",
                )
        return asked
    for name in asked:
        if name not in WAYS:
            raise InputError(
                f"{base} is quantised already ({', '.join(kinds)}), so it cannot be made {name}",
                fix="--for beside,in-grid, or give the float model as BASE",
            )
    return asked or WAYS


def longest_fidelity(asked: Sequence[str]) -> dict[str, float]:
    """Return the longest that a manifest's `made` says of precisions, to count its bytes."""
    table: dict[str, float] = {}
    for name in asked:
        measures = [name, beside(name)] if name in PRECISIONS else [name]
        table |= {f"agreement.{measure}": -0.1234 for measure in measures}
        if name in PRECISIONS:
            table[f"codes_changed.{name}"] = 0.123456
    if asked and asked[0] in WAYS:
        table |= {"grid_codes_changed": 0.123456, "grid_update_steps": 1.23e-10}
    return table
