"""Say of every fine-tune and target what is done, how good it is, and what failed and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, OutputError
from kilodelta.files import canonical, plain, staging, untrusted
from kilodelta.files.staging.stage import explained
from kilodelta.fleet.graph import Plan
from kilodelta.fleet.record import AGAIN, DONE, RECORD, read_record
from kilodelta.fleet.task import PAGE, Task

PLANNED = "made-from.json"
"""In the folder of results: which file it was made from."""
MAX_PLANNED = 1 << 16
FAILED, SKIPPED, OPEN = "failed", "not begun", "open"
_PROVED = {"merge", "onnx"}
"""Kinds whose weights are compared with the digests that the fine-tune promises."""
_ORDER = (FAILED, SKIPPED, OPEN, DONE)
MAX_ANSWERS = 64 << 20


def remember(out: Path, file: str | Path) -> None:
    """Note in a folder of results which fleet file it is made from.

    Raises:
        InputError: it holds the results of another file, which this one's would replace where
            they have one name.
        OutputError: it cannot be written, or is the folder of a model or of a device.
    """
    earlier = _made_from(out)
    with explained(out):
        other = next(filter(_is_foreign, _names(out)), "")
    if earlier is None and other:
        raise OutputError(
            f"{out} holds {other}: it is the folder of a model or of a device, not of results",
            fix="give a new folder by -o",
        )
    if earlier is not None and earlier.exists() and not earlier.samefile(file):
        raise InputError(
            f"{out} holds results of {earlier}, and is to hold those of {file}",
            fix=f"give another folder by -o; or remove {out / PLANNED} to have both in one",
        )
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    text = canonical.dumps({"file": str(Path(file).resolve())})
    staging.write(out / PLANNED, text.encode("utf-8", "surrogateescape"))


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _is_foreign(name: str) -> bool:
    return name in ("config.json", "adapter_config.json", "bundle.json") or name.endswith(
        (".safetensors", ".gguf")
    )


def _why(problem: Exception) -> str:
    if isinstance(problem, FileNotFoundError):
        return f"it has no {PLANNED}"
    return str(problem.strerror if isinstance(problem, OSError) else problem)


def located(given: str | Path, out: str | Path) -> tuple[Path, Path]:
    """Return fleet file and folder of results, where either of them was given.

    Args:
        given: a fleet file, or the folder that a run has written into.
        out: the folder of results, where `given` is a file.

    Raises:
        InputError: a folder that no run has written into.
    """
    place = Path(given)
    if not place.is_dir():
        return place, Path(out)
    try:
        return _read(place), place
    except (OSError, ValueError) as problem:
        raise InputError(
            f"{place} does not say which fleet it is of: {_why(problem)}",
            fix="give the fleet's file, and the folder by -o",
        ) from None


def _read(out: Path) -> Path:
    value = canonical.loads(plain.read(out / PLANNED, MAX_PLANNED))
    return Path(untrusted.text(untrusted.table(value, PLANNED, {"file"})["file"], "file"))


def _made_from(out: Path) -> Path | None:
    """Return which fleet file a folder is of; None where it does not say so."""
    try:
        return _read(out)
    except (OSError, ValueError):
        return None


def status_of(plan: Plan) -> dict[str, Any]:
    """Return one row for each fine-tune and target: the worst first, as plain JSON.

    A row holds `fine_tune`, `target`, `status` (`done`, `failed`, `not begun`, `open`), `why`,
    `agreement` (of the fine-tune's compression, or None), `parity` (how the result was proved, or
    how far it is off), `nbytes`, `seconds`, `place`, and `report` (its own page or record, relative
    to `out`; empty where there is none).
    """
    failed, skipped = _answers(plan.out)
    agreements = {
        task.fine_tune: _agreement(plan.out / task.place)
        for task in plan.tasks
        if task.kind == "compress"
    }
    rows = [_row(t, plan, failed, skipped, agreements) for t in plan.tasks]
    rows.sort(key=_worst_first)
    counts = {name: sum(r["status"] == name for r in rows) for name in _ORDER}
    return {"out": str(plan.out), "counts": counts, "rows": rows}


def _row(
    task: Task,
    plan: Plan,
    failed: Mapping[str, Mapping[str, Any]],
    skipped: Mapping[str, str],
    agreements: Mapping[str, float | None],
) -> dict[str, Any]:
    state = plan.states[task.id]
    status, why = (DONE, "") if state.status == DONE else (OPEN, state.why)
    if status != DONE and task.id in failed:
        status, why = FAILED, f"{failed[task.id]['error']}; {failed[task.id]['fix']}"
    elif status != DONE and task.name in skipped:
        status, why = SKIPPED, f"needs {skipped[task.name]}, which failed"
    record = read_record(plan.out / task.place) if state.status in (DONE, AGAIN) else None
    files = {} if record is None or status != DONE else record["files"]
    seconds = None if record is None or status != DONE else record.get("seconds")
    return {
        "fine_tune": task.fine_tune or "(shared)",
        "target": task.place.rpartition("/")[2],
        "status": status,
        "why": why,
        "agreement": agreements.get(task.fine_tune),
        "nbytes": sum(n for n in files.values() if isinstance(n, int)),
        "seconds": _number(seconds),
        "parity": _parity(task, record) if status == DONE else "",
        "place": task.place,
        "report": f"{task.place}/{PAGE if PAGE in files else RECORD}" if files else "",
    }


def _parity(task: Task, record: Mapping[str, Any] | None) -> str:
    """Say how a result was proved: by digests, or how far its factors are off."""
    if task.kind in _PROVED:
        return "exact"
    result = record.get("result") if record else None
    error = _number(result.get("error")) if isinstance(result, dict) else None
    return "" if error is None else f"{error:.1e}"


def _worst_first(row: Mapping[str, Any]) -> tuple[Any, ...]:
    agreement = 2.0 if row["agreement"] is None else row["agreement"]
    return _ORDER.index(row["status"]), agreement, row["fine_tune"], row["target"]


def _agreement(folder: Path) -> float | None:
    record = read_record(folder)
    try:
        value = record["result"]["after"]["agreement"] if record else None
    except (KeyError, TypeError):
        return None
    return _number(value)


def _number(value: Any) -> float | None:
    """Return a finite number of a record, which may be damaged; None for anything else."""
    try:
        return untrusted.number(value, "it")
    except untrusted.FieldError:
        return None


def _answers(out: Path) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Collect what the last runs said of tasks that are not done, of all shards."""
    failed: dict[str, Mapping[str, Any]] = {}
    skipped: dict[str, str] = {}
    for path in sorted(out.glob("run*.json")):
        try:
            found = json.loads(plain.read(path, MAX_ANSWERS))
            failed |= {a["id"]: a for a in found["failed"] if {"error", "fix"} <= set(a)}
            skipped |= {str(n): str(c) for n, c in found["skipped"].items()}
        # A damaged note of a run costs its reasons, not the status.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return failed, skipped
