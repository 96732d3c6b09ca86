"""`python -m tests.faults --kills 1000 --full 200 --pairs 100 [--command X]`: a table.

Counts are of all commands together; those that take seconds get a tenth of the others' share.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path
from random import Random

from tests.faults.harness import KINDS, Result, staged
from tests.faults.scenes import SCENES, Scene

COSTLY = 10


def main() -> int:
    """Run what the command line asks for; return 1 if a fault showed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    for kind in KINDS:
        parser.add_argument(
            f"--{kind}", type=int, default=0, help="trials of all commands together"
        )
    parser.add_argument("--command", action="append", help="one command; repeat; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", help="write the table as JSON")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [scene for name, scene in SCENES.items() if name in (options.command or SCENES)]
    chosen = [scene for scene in chosen if not _missing(scene)]
    began, rows = time.time(), list[Result]()
    shares = {kind: _shares(chosen, getattr(options, kind)) for kind in KINDS}
    for scene in chosen:
        with staged(scene) as stage:
            for kind, run in KINDS.items():
                if count := shares[kind][scene.name]:
                    rows.append(run(stage, count, Random(f"{kind} {scene.name} {options.seed}")))
                    print(_line(rows[-1]), flush=True)
                    if options.out:  # after every row: the whole run takes long
                        _write(Path(options.out), time.time() - began, rows)
    return int(not all(row.is_clean for row in rows))


def _write(path: Path, seconds: float, rows: list[Result]) -> None:
    facts = {"seconds": round(seconds), "rows": [row.to_json() for row in rows]}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _missing(scene: Scene) -> bool:
    return any(importlib.util.find_spec(name) is None for name in scene.needs)


def _shares(scenes: list[Scene], count: int) -> dict[str, int]:
    """How many trials each command gets, so that they add up to `count` at least."""
    weights = {scene.name: 1 if scene.costly else COSTLY for scene in scenes}
    total = sum(weights.values())
    return {name: -(-count * weight // total) for name, weight in weights.items()}


def _line(row: Result) -> str:
    text = (
        f"{row.command:9} {row.fault:9} {row.trials:5} trials, {row.in_time:4} in time, "
        f"{row.new:4} new, {row.mixtures} mixtures, {row.lost} lost, {row.leftovers} leftovers, "
        f"{row.tracebacks} tracebacks"
    )
    return "\n    ".join([text, *dict.fromkeys(row.notes[:5])])


if __name__ == "__main__":
    sys.exit(main())
