"""A fleet of 100 fine-tunes for 3 targets in one command, beside a shell loop of commands.

    python benchmarks/fleet.py [--count 100] [--loop 6] [--jobs 2] [--json FILE]

A small BERT and ready `.kd` files; targets: merged model, ONNX, PEFT adapter. Printed, ratios
first:

- how many times faster the fleet is than the loop `merge; export; export-peft`, which runs for the
  first `--loop` fine-tunes only and is scaled by the count (said in the output);
- the fleet's overhead above the sum of its tasks' own times divided by `--jobs`;
- a second run of the same fleet, which has nothing to do.

Results of both are compared: the loop's files are the fleet's, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

FLEET = """
version = 1
[base.small]
path = "base"
[[fine-tunes]]
deltas = ["ready/*.kd"]
[target.merged]
kind = "merge"
[target.onnx]
kind = "onnx"
[target.lora]
kind = "peft"
"""


def make_world(folder: Path, count: int) -> None:
    """Write a base and `count` fine-tunes of it."""
    from kilodelta.format.methods import Lora
    from kilodelta.format.targets import Patterns
    from tests.support import making, pico

    pico.bert_classifier(folder / "base")
    (folder / "ready").mkdir()
    patterns = Patterns(include=("bert.encoder.*.weight",), exclude=("*LayerNorm*",))
    for number in range(count):
        tune = making.delta(folder / "base", Lora(rank=2), patterns=patterns, seed=number + 1)
        tune.save(folder / "ready" / f"t{number:03d}.kd")
    (folder / "fleet.toml").write_text(FLEET)


def command(*arguments: str, cwd: Path) -> float:
    """Run one command as a shell would, in a process of its own; return its seconds."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "kilodelta", *arguments, "-q"],
        cwd=cwd,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - began


def loop(folder: Path, names: list[str]) -> float:
    """The shell loop: three commands for each fine-tune, one after the other."""
    seconds = 0.0
    for name in names:
        file = f"ready/{name}.kd"
        seconds += command("merge", "base", file, "-o", f"loop/{name}-merged", cwd=folder)
        seconds += command("export", "base", file, "-o", f"loop/{name}-onnx", "--onnx", cwd=folder)
        seconds += command("export-peft", "base", file, "-o", f"loop/{name}-lora", cwd=folder)
    return seconds


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def require_equal(folder: Path, names: list[str]) -> int:
    """Compare the loop's results with the fleet's; return how many files were compared."""
    compared = 0
    for name in names:
        place = folder / "out" / "fine-tunes" / name
        pairs = [
            *zip(
                sorted((folder / "loop" / f"{name}-merged").glob("*.safetensors")),
                sorted((place / "merged" / "merged").glob("*.safetensors")),
                strict=True,
            ),
            *zip(
                sorted((folder / "loop" / f"{name}-onnx").glob("*.onnx")),
                sorted((place / "onnx").glob("*.onnx")),
                strict=True,
            ),
            *zip(
                sorted((folder / "loop" / f"{name}-lora").glob("*.safetensors")),
                sorted((place / "lora" / "adapter").glob("*.safetensors")),
                strict=True,
            ),
        ]
        for one, two in pairs:
            if digest(one) != digest(two):
                raise SystemExit(f"{one} and {two} differ")
        compared += len(pairs)
    return compared


def measure(count: int, looped: int, jobs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["KILODELTA_CACHE"] = str(folder / "cache")
        # As where the package is installed: its modules are compiled once, not by every process.
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
        make_world(folder, count)
        (folder / "loop").mkdir()
        command("digest", "base", cwd=folder)  # kernels compiled and base hashed, for both
        names = [f"t{number:03d}" for number in range(looped)]
        loop_seconds = loop(folder, names) / looped * count
        arguments = ("fleet", "run", "fleet.toml", "-o", "out", "--jobs", str(jobs))
        fleet_seconds = command(*arguments, cwd=folder)
        own = json.loads((folder / "out" / "run.json").read_text())
        again = command(*arguments, cwd=folder)
        compared = require_equal(folder, names)
    return {
        "loop_over_fleet": loop_seconds / fleet_seconds,
        "overhead": fleet_seconds / (own["seconds"] / jobs) - 1,
        "fine_tunes": count,
        "tasks": own["done"],
        "jobs": jobs,
        "fleet_seconds": fleet_seconds,
        "tasks_seconds": own["seconds"],
        "loop_seconds_scaled": loop_seconds,
        "loop_measured_on": looped,
        "second_run_seconds": again,
        "files_equal": compared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--loop", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(given.count, given.loop, given.jobs)
    print(
        f"shell loop over fleet {found['loop_over_fleet']:.1f}x"
        f" (loop measured on {given.loop} fine-tunes and scaled)\n"
        f"overhead above the tasks' own times {100 * found['overhead']:.0f} %\n"
        f"{found['tasks']} tasks in {found['fleet_seconds']:.1f} s, {given.jobs} at once;"
        f" again, nothing to do: {found['second_run_seconds']:.1f} s\n"
        f"{found['files_equal']} files of both are equal"
    )
    if given.json:
        text = json.dumps({"machine": describe(), **found}, indent=2)
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
