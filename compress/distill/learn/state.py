"""The state of an interrupted run: written beside its file, read again, judged before it is used.

A `.resume` file is what `torch.save` writes, of tensors, numbers and texts only, so that reading
one runs no code. It names every fact that makes two runs the same; a run with other facts is
another run, however its files are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kilodelta.errors import InputError, one_line
from kilodelta.files import staging

VERSION = 5
_FIELDS = {
    "version", "facts", "step", "spent", "state", "optimiser", "masters", "best", "measures",
    "curve", "watch", "order",
}  # fmt: skip

Facts = Mapping[str, str]
"""What makes two runs the same: what is compared, in words, and its value or digest."""


def place_of(out: Path) -> Path:
    """Return where the state of a run towards `out` lies.

    Example:
        >>> place_of(Path("task.kd")).name
        'task.kd.resume'
    """
    return out.with_name(out.name + ".resume")


def save(path: Path, facts: Facts, state: Mapping[str, Any]) -> None:
    """Write a run's state, in full or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with staging.new_file(path) as stage:
        torch.save({"version": VERSION, "facts": dict(facts), **state}, stage)


def require(path: Path) -> None:
    """Check that a run has left its state.

    Raises:
        InputError: it has not.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist", fix="start without --resume")


def load(path: Path, facts: Facts) -> dict[str, Any]:
    """Read a run's state and see that it is of the same run.

    Args:
        path: where `save` has written it.
        facts: what the run that goes on is.

    Raises:
        InputError: there is none, it is damaged, or it belongs to another run; the facts that
            differ are named.
    """
    require(path)
    with explained(path):
        found: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    whole = isinstance(found, dict) and found.keys() >= _FIELDS
    if not whole or found["version"] != VERSION or not isinstance(found["facts"], dict):
        raise InputError(
            f"{path} is no state of a run that this kilodelta wrote",
            fix="start without --resume, and with --force",
        )
    other = found["facts"]
    differing = [key for key in {**other, **facts} if other.get(key) != facts.get(key)]
    if differing:
        raise InputError(
            f"{path} belongs to a run with other {', '.join(differing)}",
            fix="give the same arguments, or start without --resume",
        )
    return found


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn any error of reading or using a damaged state into a sentence."""
    try:
        yield
    except Exception as error:  # torch, pickle and zipfile raise some ten unrelated classes
        raise InputError(
            f"{path} is damaged: {one_line(error)}", fix="start without --resume, and with --force"
        ) from None
