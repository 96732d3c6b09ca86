"""`python -m tests.fuzz --count 10000 [--surface X] [--seed S] [-o FILE]`: a table.

The exit code is 1 if a fault showed. Each surface runs in a separate process, so one that breaks
its process is seen as such and the others go on. The table is written every few hundred inputs; the
same command with the same file goes on where it was stopped, because an input follows from its
number alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.harness import Result

COLUMNS = ("surface", "inputs", "accepted", "refused", "tracebacks", "hangs", "over memory",
           "slowest", "peak memory")  # fmt: skip
BAD = ("tracebacks", "hangs", "over_memory", "broken")
EVERY = 250
"""Inputs after which a surface's row is written."""


def main() -> int:
    """Run what the command line asks for."""
    options = _options()
    if options.worker:
        return _work(options)
    from tests.fuzz.surfaces import SURFACES

    table = Table.open(options)
    for name in options.surface or list(SURFACES):
        missing = [n for n in SURFACES[name].needs if importlib.util.find_spec(n) is None]
        if missing:
            table.put({"surface": name, "missing": missing})
        else:
            _feed(name, options, table)
        print(_line(table.rows[name]), flush=True)
    return int(any(row.get(key) for row in table.rows.values() for key in BAD))


@dataclass(kw_only=True)
class Table:
    """The rows by surface, and the file that holds them."""

    path: Path | None
    command: str
    rows: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, options: argparse.Namespace) -> Table:
        """Return the table of a file, if the same command wrote it; an empty one otherwise."""
        command = f"python -m tests.fuzz --count {options.count} --seed {options.seed}"
        path = Path(options.out) if options.out else None
        rows: dict[str, dict[str, Any]] = {}
        if path and path.exists():
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["command"] == command:
                rows = {row["surface"]: row for row in facts["surfaces"]}
        return cls(path=path, command=command, rows=rows)

    def done(self, name: str) -> dict[str, Any] | None:
        """Return the row of a surface that showed no fault so far."""
        row = self.rows.get(name)
        return row if row and "inputs" in row and not any(row.get(key) for key in BAD) else None

    def put(self, row: dict[str, Any]) -> None:
        """Take the place of the surface's row, and write the file."""
        self.rows[row["surface"]] = row
        if self.path is None:
            return
        facts = {"command": self.command, "surfaces": list(self.rows.values())}
        stage = self.path.with_suffix(".part")
        stage.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        stage.replace(self.path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--count", type=int, default=1000, help="inputs for each surface")
    parser.add_argument("--surface", action="append", help="one surface; repeat; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("-o", "--out", help="write the table as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _work(options: argparse.Namespace) -> int:
    """Run one surface in this process, and print its row as JSON now and then; faults to stderr."""
    from tests.fuzz.harness import run
    from tests.fuzz.surfaces import SURFACES

    # The harness sends both streams of libraries nowhere; these two are kept from it, and from
    # what is not Python: the tokenizers package prints to the process's own streams.
    errors, rows = os.fdopen(os.dup(2), "w"), os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    (name,) = options.surface
    began = time.monotonic()

    def tell(result: Result) -> None:
        row = {**result.to_json(), "run_seconds": round(time.monotonic() - began, 1)}
        print(json.dumps(row), file=rows, flush=True)

    result = run(
        SURFACES[name],
        options.count,
        seed=options.seed,
        first=options.first,
        show=lambda text: print(f"{name}: {text}", file=errors, flush=True),
        each=lambda result: tell(result) if result.inputs % EVERY == 0 else None,
    )
    tell(result)
    return 0


def _feed(name: str, options: argparse.Namespace, table: Table) -> None:
    """Run a surface in a process, from where its row in the table ends."""
    before = table.done(name)
    first = before["inputs"] if before else 0
    if first >= options.count:
        return
    command = [sys.executable, "-m", "tests.fuzz", "--worker", "--surface", name]
    command += ["--count", str(options.count - first), "--seed", str(options.seed)]
    command += ["--first", str(options.first + first)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        table.put(_sum(before, json.loads(line)))
    if process.wait():
        broken = f"its process ended with {process.returncode}"
        table.put({**table.rows.get(name, {}), "surface": name, "broken": broken})


def _sum(one: dict[str, Any] | None, two: dict[str, Any]) -> dict[str, Any]:
    """Return the row of two runs of a surface."""
    if one is None:
        return two
    worst = {key: max(one[key], two[key]) for key in ("slowest_seconds", "peak_bytes")}
    added = {key: one[key] + two[key] for key in two if key not in (*worst, "surface")}
    return {**two, **added, **worst, "run_seconds": round(added["run_seconds"], 1)}


def _line(row: dict[str, Any]) -> str:
    if "inputs" not in row or "broken" in row:
        return f"{row['surface']}: {row.get('broken') or 'not run, lacks ' + str(row['missing'])}"
    return "  ".join(
        f"{label} {value}"
        for label, value in zip(
            COLUMNS,
            (
                row["surface"],
                *(row[k] for k in ("inputs", "accepted", "refused", "tracebacks", "hangs")),
                row["over_memory"],
                f"{row['slowest_seconds']:.2f} s",
                f"{row['peak_bytes'] / 2**20:.0f} MB",
            ),
            strict=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
