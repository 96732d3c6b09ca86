"""Compute outputs with what a device folder serves, and describe them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, with_spinner


@click.command(
    cls=Command,
    short_help="Compute outputs with what a device folder serves.",
    examples=[
        "kilodelta run device/ --inputs inputs.npz -o outputs.npz",
        "kilodelta run device/ --inputs inputs.npz --delta other.kd",
        "kilodelta run device/ --inputs two-rows.npz --delta a.kd --delta base",
    ],
)
@click.argument("folder", type=click.Path())
@click.option(
    "--inputs", required=True, type=click.Path(), help="An .npz file with one array per input."
)
@click.option(
    "--delta",
    multiple=True,
    type=click.Path(),
    help="Another .kd file for this request, or: base. Repeat it, once per row of the inputs, "
    "where the folder was bundled with --slots.",
)
@click.option("-o", "--out", type=click.Path(), help="An .npz file for the outputs.")
@as_json
@with_spinner
def run(
    folder: str, inputs: str, delta: tuple[str, ...], out: str | None, as_json: bool
) -> Callable[[], None]:
    """Compute outputs with what a device FOLDER serves.

    Inputs are arrays, not texts: tokenize in the application.
    """
    from kilodelta.device import run

    described = _summary(run(folder, inputs, delta=delta, out=out))
    if as_json:
        return lambda: terminal.print_json({"outputs": described, "out": out})
    columns = ("output", "dtype", "shape", "least", "mean", "largest")
    rows = [[_short(value) for value in row.values()] for row in described]
    return lambda: terminal.print_table(folder, columns, rows)


def _summary(outputs: Any) -> list[dict[str, Any]]:
    """Describe each output by values that JSON can hold."""
    return [
        {
            "output": name,
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "least": _number(array.min()) if array.size else None,
            "mean": _number(array.mean(dtype="float64")) if array.size else None,
            "largest": _number(array.max()) if array.size else None,
        }
        for name, array in outputs.items()
    ]


def _number(value: Any) -> float | str:
    """Return a number, or "nan" and "inf" as texts, which strict JSON lacks."""
    number = float(value)
    return number if abs(number) < float("inf") else str(number)


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
