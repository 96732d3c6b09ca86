"""Run one task in a separate process; its result takes its name only when it is whole.

A child gets one task as JSON and answers with one JSON object: what was made, or the sentence, fix
and exit code of what went wrong. `python -m kilodelta.fleet.child` reads the task from standard
input, for schedulers that start their own processes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kilodelta.errors import KiloDeltaError
from kilodelta.files import canonical, staging
from kilodelta.fleet.record import RECORD, read_record
from kilodelta.fleet.sources import require_unchanged
from kilodelta.fleet.work import WORK

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
"""What libraries read once, when they load: a task's threads are its process's from its start."""


def thread_environment(threads: int) -> dict[str, str]:
    """Return the variables that fix the number of threads in a new process."""
    return dict.fromkeys(THREADS, str(threads))


def do(
    task: Mapping[str, Any], out: Path, computed: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Do a task and return its answer; errors are part of it, never raised.

    Args:
        task: a `Task` as JSON.
        out: the fleet's output folder.
        computed: called when the result has only to be put on the disk and given its name.
    """
    began = time.monotonic()
    place = out / task["place"]
    answer: dict[str, Any] = {"id": task["id"], "name": task["name"], "status": "done"}
    try:
        earlier = read_record(place)
        # The id is a digest of all that the task depends on: an equal one means an equal result.
        if earlier is not None and earlier.get("id") == task["id"] and _whole(place, earlier):
            return {**answer, "result": earlier.get("result"), "seconds": 0.0, "again": False}
        place.parent.mkdir(parents=True, exist_ok=True)
        with staging.new_folder(place, replace=True) as stage:
            require_unchanged(task)
            result = WORK[task["kind"]](_resolved(task["params"], out), stage)
            answer |= {"result": result, "seconds": round(time.monotonic() - began, 3)}
            computed()
            record = {
                "id": task["id"],
                "kind": task["kind"],
                "name": task["name"],
                "key": dict(task["key"]),
                "seconds": answer["seconds"],
                "result": result,
                "files": _files(stage),
            }
            text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False)
            (stage / RECORD).write_text(text + "\n", encoding="utf-8")
    except KiloDeltaError as error:
        return _failed(answer, began, error.what, error.fix, error.exit_code)
    except KeyboardInterrupt:
        return _failed(answer, began, "interrupted", "run it again", 130)
    # A fault of ours in one of hundreds of tasks is that task's alone; the report shows where.
    except Exception as error:
        trace = "".join(traceback.format_exception(error)[-3:])
        what = f"{type(error).__name__}: {error}"
        return {**_failed(answer, began, what, "report it", 1), "traceback": trace[-4000:]}
    return {**answer, "again": True}


def _whole(place: Path, record: Mapping[str, Any]) -> bool:
    """Return whether the files of an earlier result are complete, by their sizes."""
    try:
        return all((place / n).stat().st_size == size for n, size in record["files"].items())
    except (OSError, ValueError):
        return False


def _failed(answer: dict[str, Any], began: float, what: str, fix: str, code: int) -> dict[str, Any]:
    seconds = round(time.monotonic() - began, 3)
    told = {"status": "failed", "error": what, "fix": fix, "exit_code": code}
    return {**answer, **told, "seconds": seconds}


def _resolved(params: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Parameters with the places of other tasks' results filled in."""
    return {
        key: value.replace("{out}", str(out), 1)
        if isinstance(value, str) and value.startswith("{out}/")
        else value
        for key, value in params.items()
    }


def _files(folder: Path) -> dict[str, int]:
    """Sizes of all files, by their path in the folder."""
    paths = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    return {os.path.relpath(path, folder): os.stat(path).st_size for path in paths}


def main() -> int:
    """Read `{"task": ..., "out": ...}` from standard input and print the answer."""
    given = canonical.loads(sys.stdin.buffer.read())
    # What libraries print belongs to the log; the answer has standard output to itself.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer = do(given["task"], Path(given["out"]))
    answers.write(json.dumps(answer) + "\n")
    answers.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
