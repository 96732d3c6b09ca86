"""One part of a GPU's proof: its rows, and whether it passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from kilodelta.errors import KiloDeltaError, MissingPackageError, one_line
from kilodelta.verify.parity.result import FAILED, NOT_RUN, PASSED, Json
from kilodelta.verify.runners.runner import UnavailableError

T = TypeVar("T")

MEASURED = "measured"
"""The status of a row that holds a measurement, which neither passes nor fails."""


@dataclass(frozen=True, kw_only=True)
class PartRow:
    """One thing that was looked at.

    Attributes:
        what: what it is.
        found: what came out.
        status: `passed`, `failed`, `measured` or `not run`.
        numbers: what was measured, for the JSON.
    """

    what: str
    found: str
    status: str = PASSED
    numbers: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a part runs.

    Attributes:
        device: such as `cuda`.
        folder: an empty folder for its files.
        small: use pico models, to try the part itself.
    """

    device: str
    folder: Path
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part's name, and its rows in the order in which they came."""

    name: str
    rows: tuple[PartRow, ...]

    @property
    def status(self) -> str:
        """`failed` if any row failed, else `passed`, else `measured`, else `not run`."""
        statuses = {row.status for row in self.rows}
        return next((s for s in (FAILED, PASSED, MEASURED) if s in statuses), NOT_RUN)

    def to_json(self) -> Json:
        """Return everything, fit for strict JSON."""
        rows = [asdict(row) for row in self.rows]
        return {"name": self.name, "status": self.status, "rows": rows}


def run(name: str, work: Callable[[Setting], Iterator[PartRow]], setting: Setting) -> Part:
    """Run a part. An error becomes its last row, so that other parts still run.

    Args:
        name: the part's.
        work: yields its rows.
        setting: where it runs.
    """
    return Part(name=name, rows=tuple(guarded(name, work(setting))))


def guarded(what: str, rows: Iterator[T]) -> Iterator[T | PartRow]:
    """Yield rows until an error, and the error as the last row.

    It is `not run` if a package, the right machine or enough memory is missing, else `failed`.

    Args:
        what: the last row's `what`.
        rows: rows, or measurements.
    """
    try:
        yield from rows
    except (MissingPackageError, UnavailableError) as error:
        yield PartRow(what=what, found=f"not run: {error.what}", status=NOT_RUN)
    except KiloDeltaError as error:
        yield PartRow(what=what, found=error.what, status=FAILED)
    except Exception as error:
        kind = type(error).__name__
        if kind == "OutOfMemoryError":  # torch's, which may not be installed
            yield PartRow(what=what, found="not run: the GPU's memory is too small", status=NOT_RUN)
        else:
            yield PartRow(what=what, found=f"{kind}: {one_line(error)}", status=FAILED)
