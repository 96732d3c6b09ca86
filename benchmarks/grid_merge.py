"""How fast a merge in the grid is, beside a plain copy of the same checkpoint, and its memory.

    python benchmarks/grid_merge.py [--megabytes 500] [--work DIR] [--json FILE] [--before TREE]

The checkpoint is synthetic: matrices of 4096 x 4096 in compressed-tensors' int4 g32, random codes
and float16 scales; the file a LoRA of rank 4 over all of them. `kilodelta merge` proves the base,
merges, writes, decodes what it packed and proves the result; the copy is one of the same bytes with
`fsync`. Beside them a merge of as many bytes of float16 weights, and with `--before` the merge in
the grid by another source tree. All are timed in turn, in processes of their own, and the anonymous
memory is polled. Times of a busy machine are of little use: the processor seconds are printed as
well. `hash` is what one thread needs for the SHA-256 of as many bytes as the result's root is over:
one per code, eight per scale. `floor` is a copy that does this as well, part by part: what no merge
that proves its result can be below on one core, start aside. `start` is a command that only starts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

import kilodelta
from kilodelta.files import safetensors
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid import open_quantised
from kilodelta.grid.open import is_quantised
from kilodelta.merging.build import Recipe, build, quantise_target

SIDE, GROUP, RANK = 4096, 32, 4
MATRIX = SIDE * SIDE // 2 + SIDE * SIDE // GROUP * 2
"""Bytes of one matrix: codes and scales."""
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
            },
        }
    },
}
COPY = """
import os, shutil, sys
shutil.copyfile(sys.argv[1], sys.argv[2])
with open(sys.argv[2], "rb") as file:
    os.fsync(file)
"""
HASH = """
import hashlib, sys
state, part = hashlib.sha256(), bytes(1 << 20)
for _ in range(int(sys.argv[1]) >> 20):
    state.update(part)
"""
FLOOR = """
import hashlib, os, sys
state, extra = hashlib.sha256(), bytes(1 << 20)
hashed, size = int(sys.argv[3]), os.path.getsize(sys.argv[1])
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb") as target:
    done, due = 0, 0
    while part := source.read(1 << 20):
        target.write(part)
        due += len(part) * hashed // size
        while done < due:
            state.update(extra)
            done += len(extra)
    target.flush()
    os.fsync(target)
"""


def main() -> None:
    """Make the checkpoint and the file once, then time both, three times in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=500, help="of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path("grid-merge"), help="checkpoint and copy")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--before", type=Path, help="another source tree, to run beside this one")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    count = max(1, options.megabytes * 10**6 // MATRIX)
    base, file = options.work / "base", options.work / "task.kd"
    floats, float_file = options.work / "floats", options.work / "floats.kd"
    if not float_file.exists():
        write_base(base, count)
        write_file(base, file)
        write_floats(floats, count * MATRIX // (2 * SIDE * SIDE))
        write_file(floats, float_file)
    weights = base / "model.safetensors"
    hashed = SIDE * SIDE * count + SIDE * SIDE // GROUP * 8 * count
    trees = {"merge": Path(__file__).parents[1]}
    if options.before:
        trees["merge before"] = options.before
    runs = []
    for _ in range(options.runs):
        done = {"copy": copy(weights, options.work / "copy")}
        done |= {name: merge(tree, base, file, options.work) for name, tree in trees.items()}
        done["copy of floats"] = copy(floats / "model.safetensors", options.work / "copy")
        done["merge of floats"] = merge(trees["merge"], floats, float_file, options.work)
        done["start"] = timed([sys.executable, "-m", "kilodelta", "digest", str(file)])
        copied = options.work / "copy"
        copied.unlink(missing_ok=True)
        places = [str(weights), str(copied), str(hashed)]
        done["floor"] = timed([sys.executable, "-c", FLOOR, *places])
        done["hash"] = timed([sys.executable, "-c", HASH, str(hashed)])
        runs.append(done)
    report = {"machine": describe(), "bytes": weights.stat().st_size, "runs": runs}
    report["times a copy"] = {
        name: {key: ratio(runs, name, beside, key) for key in ("seconds", "processor seconds")}
        for name, beside in (
            *((name, "copy") for name in (*trees, "floor", "hash")),
            ("merge of floats", "copy of floats"),
        )
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def ratio(runs: list[dict[str, Any]], name: str, beside: str, key: str) -> float:
    """Divide the median of one job by that of another."""
    ours, theirs = (sorted(run[what][key] for run in runs) for what in (name, beside))
    return float(round(ours[len(ours) // 2] / theirs[len(theirs) // 2], 2))


def write_floats(place: Path, count: int) -> None:
    """Write a checkpoint of `count` float16 matrices."""
    rng = np.random.default_rng(2)
    place.mkdir(parents=True)
    safetensors.write(
        place / "model.safetensors",
        {
            f"layers.{i}.proj.weight": RawTensor.of(
                (rng.random((SIDE, SIDE), np.float32) * 0.1 - 0.05).astype(np.float16)
            )
            for i in range(max(1, count))
        },
    )
    (place / "config.json").write_text("{}")


def write_base(place: Path, count: int) -> None:
    """Write a checkpoint of `count` matrices."""
    rng = np.random.default_rng(0)
    place.mkdir(parents=True)
    tensors = {}
    for i in range(count):
        name = f"layers.{i}.proj."
        packed = rng.integers(0, 256, (SIDE, SIDE // 2), np.uint8).view(np.int32)
        scales = (rng.random((SIDE, SIDE // GROUP), np.float32) * 0.01 + 0.002).astype(np.float16)
        tensors[f"{name}weight_packed"] = RawTensor.of(packed)
        tensors[f"{name}weight_scale"] = RawTensor.of(scales)
        tensors[f"{name}weight_shape"] = RawTensor.of(np.array([SIDE, SIDE], np.int64))
    safetensors.write(place / "model.safetensors", tensors)
    (place / "config.json").write_text(json.dumps({"quantization_config": CONFIG}))


def write_file(base: Path, path: Path) -> None:
    """Write a LoRA of every matrix, whose update is about a step of the grid."""
    rng, lora = np.random.default_rng(1), Lora(rank=RANK)
    found = {}
    names = (
        open_quantised(base).stored if is_quantised(base) else kilodelta.Checkpoint.open(base).names
    )
    for name in names:
        floats = {"A": rng.normal(size=(RANK, SIDE)), "B": rng.normal(size=(SIDE, RANK))}
        found[name] = quantise_target(lora, {k: v * 0.05 for k, v in floats.items()}, 4)
    recipe = Recipe(method=lora, patterns=Patterns(include=("*.weight",)), bits=4)
    build(base, recipe, found).save(path)


def copy(weights: Path, copied: Path) -> dict[str, float]:
    """Time a plain copy."""
    copied.unlink(missing_ok=True)
    return timed([sys.executable, "-c", COPY, str(weights), str(copied)])


def merge(tree: Path, base: Path, file: Path, work: Path) -> dict[str, float]:
    """Time a merge by the code of a source tree."""
    merged = work / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    places = [str(path.resolve()) for path in (base, file, merged)]
    command = [sys.executable, "-m", "kilodelta", "merge", *places[:2], "-o", places[2]]
    return timed(command, tree.resolve())


def timed(command: list[str], tree: Path | None = None) -> dict[str, float]:
    """Run a command, in a source tree's folder: seconds, processor seconds, most anonymous MB."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    environment = {**os.environ, **({"PYTHONPATH": str(tree)} if tree else {})}
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=tree
    )
    most = 0
    while process.poll() is None:
        most = max(most, anonymous(process.pid))
        time.sleep(0.02)
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0, command
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": round(seconds, 2),
        "processor seconds": round(used, 2),
        "anonymous MB": round(most / 1e6, 1),
    }


def anonymous(pid: int) -> int:
    """Read a process's anonymous memory, in bytes."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # What is installed has its byte code beside it; else each start would compile the sources.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    main()
