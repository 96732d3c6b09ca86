"""`python -m tests.fuzz --count 10000 [--surface X] [--seed S]`: a table, and 1 if a fault showed.

Each surface runs in a process of its own, so one that breaks its process is seen as such and the
others go on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COLUMNS = ("surface", "inputs", "accepted", "refused", "tracebacks", "hangs", "over memory",
           "slowest", "peak memory")  # fmt: skip


def main() -> int:
    """Run what the command line asks for."""
    options = _options()
    if options.worker:
        return _work(options)
    from tests.fuzz.surfaces import SURFACES

    chosen = options.surface or list(SURFACES)
    began, rows = time.time(), []
    for name in chosen:
        missing = [n for n in SURFACES[name].needs if importlib.util.find_spec(n) is None]
        rows.append({"surface": name, "missing": missing} if missing else _row(name, options))
        print(_line(rows[-1]), flush=True)
    if options.out:
        facts = {
            "command": f"python -m tests.fuzz --count {options.count} --seed {options.seed}",
            "seconds": round(time.time() - began),
            "surfaces": rows,
        }
        Path(options.out).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    bad = ("tracebacks", "hangs", "over_memory", "broken")
    return int(any(row.get(key) for row in rows for key in bad))


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
    """Run one surface in this process, and print its row as JSON; faults go to stderr."""
    from tests.fuzz.harness import run
    from tests.fuzz.surfaces import SURFACES

    errors = os.fdopen(os.dup(2), "w")
    (name,) = options.surface
    result = run(
        SURFACES[name],
        options.count,
        seed=options.seed,
        first=options.first,
        show=lambda text: print(f"{name}: {text}", file=errors, flush=True),
    )
    print(json.dumps(result.to_json()))
    return 0


def _row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.fuzz", "--worker", "--surface", name, "--count"]
    command += [str(options.count), "--seed", str(options.seed), "--first", str(options.first)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"surface": name, "broken": f"its process ended with {done.returncode}"}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _line(row: dict[str, Any]) -> str:
    if "inputs" not in row:
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
