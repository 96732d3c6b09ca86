"""Run the table of architectures, keep what happened, and write docs/models.md from it.

    python -m tests.models.table [NAME ...] [--part I/N] [--steps A,B] [--page]

Each outcome is written as it comes, so that a run can be interrupted and go on, several processes
can share the table, and a single architecture can be run again. `--page` writes the page from the
file, once they are all done. With `--steps` the others stay as they were.
"""

from __future__ import annotations

import argparse
import fcntl
import gc
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from tests.models.page import page, surveyed
from tests.support.processes import ROOT

RESULTS = ROOT / "tests" / "models" / "results.json"
PAGE = ROOT / "docs" / "models.md"
SURVEY = ROOT / "benchmarks" / "results" / "rtx-survey-2026-11-28-epyc.json"
PACKAGES = ("transformers", "torch", "onnxscript", "onnxruntime", "tensorrt_rtx_cu13")

Results: TypeAlias = dict[str, Any]


def read() -> Results:
    """The results so far: versions of `packages`, and by name each architecture's `steps`."""
    if not RESULTS.exists():
        return {"packages": {}, "architectures": {}}
    results: Results = json.loads(RESULTS.read_text())
    return results


def keep(name: str, row: dict[str, Any]) -> None:
    """Add one row to the file; other processes may do so at the same time."""
    from tests.models.architectures import TABLE

    with (ROOT / "tests" / "models" / "table.py").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {**read()["architectures"], name: row}
        packages = dict(_versions())
        ordered = {a.name: rows[a.name] for a in TABLE if a.name in rows}
        text = json.dumps({"packages": packages, "architectures": ordered}, indent=1)
        RESULTS.write_text(text + "\n")


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def _run(name: str, steps: Container[str]) -> None:
    from tests.models.architectures import TABLE
    from tests.models.steps import NEEDS, run

    [architecture] = [a for a in TABLE if a.name == name]
    began = time.process_time()
    gc.collect()
    gc.disable()  # torch makes so many objects while it traces that looking for cycles takes long
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(architecture, Path(folder), steps)
    seconds = round(time.process_time() - began, 1)
    row = read()["architectures"].get(name, {"steps": {}})
    before = {step: text for step, text in row["steps"].items() if step not in steps}
    known = {**before, **outcomes}
    keep(name, {"class": architecture.model, "steps": {s: known[s] for s in NEEDS if s in known}})
    said = "; ".join(f"{k} {v}" for k, v in outcomes.items() if v != "right") or "all right"
    print(f"{name} ({seconds} s of CPU): {said}", flush=True)


def main() -> None:
    """Run what is asked for, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help="architectures; by default those without outcome")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth architecture from the Ith")
    parser.add_argument("--steps", help="by commas; by default all but the engine")
    parser.add_argument("--page", action="store_true", help="write the page; run nothing")
    given = parser.parse_args()
    if not given.page:
        from tests.models.architectures import TABLE
        from tests.models.steps import USUAL

        first, step = map(int, given.part.split("/"))
        for name in given.names or [a.name for a in TABLE[first::step]]:
            if given.names or name not in read()["architectures"]:
                _run(name, given.steps.split(",") if given.steps else USUAL)
    else:
        PAGE.write_text(page(read(), surveyed(json.loads(SURVEY.read_text()))))


if __name__ == "__main__":
    main()
