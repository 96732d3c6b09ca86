"""One part of a GPU's proof: its rows, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from kilodelta.errors import KiloDeltaError, MissingPackageError
from kilodelta.verify.parity.result import FAILED, NOT_RUN, PASSED, Json
from kilodelta.verify.runners.runner import UnavailableError, one_line

T = TypeVar("T")

MEASURED = "measured"
"""Of a row that holds a measurement: nothing passes or fails."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing looked at: what, what was found, and `passed`, `failed`, `measured` or `not run`.

    `numbers` are what was measured, for the JSON.
    """

    what: str
    found: str
    status: str = PASSED
    numbers: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a part runs: a device, and a folder of its own; `small` for a trial on a CPU."""

    device: str
    folder: Path
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part's name and its rows in the order in which they came."""

    name: str
    rows: tuple[Row, ...]

    @property
    def status(self) -> str:
        """Failed if any row failed, passed if any passed, measured if any was, else not run."""
        found = {row.status for row in self.rows}
        return next((s for s in (FAILED, PASSED, MEASURED) if s in found), NOT_RUN)

    def to_json(self) -> Json:
        rows = [asdict(row) for row in self.rows]
        return {"name": self.name, "status": self.status, "rows": rows}


def run(name: str, work: Callable[[Setting], Iterator[Row]], setting: Setting) -> Part:
    """A part's rows as far as it comes; whatever stops it becomes a row that failed, so that the
    other parts still run."""
    return Part(name=name, rows=tuple(guarded(name, work(setting))))


def guarded(what: str, found: Iterator[T]) -> Iterator[T | Row]:
    """Rows or the like as far as they come, and as the last one what stopped them: `not run` where
    a package, the right machine or enough memory is missing, else a failure."""
    try:
        yield from found
    except (MissingPackageError, UnavailableError) as error:
        yield Row(what=what, found=f"not run: {error.what}", status=NOT_RUN)
    except KiloDeltaError as error:
        yield Row(what=what, found=error.what, status=FAILED)
    except Exception as error:
        kind = type(error).__name__
        if kind == "OutOfMemoryError":  # torch's, which may not be installed
            yield Row(what=what, found="not run: the GPU's memory is too small", status=NOT_RUN)
        else:
            yield Row(what=what, found=f"{kind}: {one_line(error)}", status=FAILED)
