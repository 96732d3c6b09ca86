"""One part of a GPU's proof: its rows, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kilodelta.errors import KiloDeltaError
from kilodelta.verify.result import FAILED, NOT_RUN, PASSED, Json


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing looked at: what, what was found, and `passed`, `failed` or `not run`."""

    what: str
    found: str
    status: str = PASSED


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
        """Failed if any row failed, passed if any passed, else not run."""
        found = {row.status for row in self.rows}
        return next((s for s in (FAILED, PASSED) if s in found), NOT_RUN)

    def to_json(self) -> Json:
        rows: list[dict[str, Any]] = [asdict(row) for row in self.rows]
        return {"name": self.name, "status": self.status, "rows": rows}


def run(name: str, work: Callable[[Setting], Iterator[Row]], setting: Setting) -> Part:
    """A part's rows as far as it comes; whatever stops it becomes a row that failed, so that the
    other parts still run."""
    rows: list[Row] = []
    try:
        for row in work(setting):
            rows.append(row)
    except KiloDeltaError as error:
        rows.append(Row(what=name, found=error.what, status=FAILED))
    except Exception as error:
        rows.append(Row(what=name, found=f"{type(error).__name__}: {error}", status=FAILED))
    return Part(name=name, rows=tuple(rows))
