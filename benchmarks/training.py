"""Training steps and their memory, side by side with HF PEFT and the official NOLA code's way.

    python benchmarks/training.py [--json FILE] [--threads N] [--models ...] [--accuracy]

Prints ratios first: ours over theirs, so less is better, and beside it what is wanted. A step is
forward, backward and Adam on 16 texts of 32 tokens; the two of a row take turns, and the best of
their turns counts. Memory is what a fresh process has at its peak in two steps above the loaded
model. `--accuracy` trains on TREC-6 and Banking77 too, and compares at equal bytes; it takes hours
on few cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
from machine import describe, peak_memory
from torch import nn
from training_accuracy import EQUAL, compare, print_accuracy
from training_methods import METHODS, MODELS

from kilodelta.verify.gpu.training import TrainingStep, sharing
from kilodelta.verify.runners.timing import side_by_side

TEXTS, TOKENS = 16, 32
PAIRS: tuple[tuple[str, str, float | None, float], ...] = (
    ("NOLA", "PEFT LoRA r = 8", 1.3, 1.0),
    ("NOLA", "official NOLA", 1 / 3, 1.0),
    ("RandLoRA", "PEFT RandLora", 1.0, 1.0),
    ("VeRA", "PEFT VeRA", None, 1.0),
    ("LoRA r = 1", "PEFT LoRA r = 1", None, 1.0),
    ("LoRA r = 8", "PEFT LoRA r = 8", None, 1.0),
)
"""Ours, theirs, and the largest ratio wanted in time, if one is, and in memory."""


def main() -> None:
    """Run everything and print one table a model."""
    options = _options()
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {"machine": describe(), "threads": options.threads, "models": {}}
    for name in options.models:
        report["models"][name] = rows(name, options.threads, options.repeats)
    _print(report)
    if options.accuracy:
        report["accuracy"] = compare(
            options.data, options.sets, options.against, options.steps, options.seed
        )
        print_accuracy(report["accuracy"])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _options() -> argparse.Namespace:
    data = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--accuracy", action="store_true", help="train and compare, for hours")
    parser.add_argument("--data", type=Path, default=data, help="folder with the two sets")
    parser.add_argument("--sets", nargs="+", default=["trec6", "banking77"])
    parser.add_argument("--against", nargs="+", choices=EQUAL, default=list(EQUAL))
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def step(model: nn.Module) -> TrainingStep:
    """A training step of an adapted model, as often as it is called."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 20000, (TEXTS, TOKENS), generator=generator)
    return TrainingStep(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def rows(model: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """Time and memory of every pair on one model."""
    base = MODELS[model]()
    steps = {name: step(attach(sharing(base))) for name, attach in METHODS.items()}
    print(f"{model}: memory ...", file=sys.stderr, flush=True)
    memory = {name: _memory(model, name, threads) for name in METHODS}
    found = []
    for ours, theirs, time_wanted, memory_wanted in PAIRS:
        print(f"{model}: {ours}, {theirs} ...", file=sys.stderr, flush=True)
        pair = {ours: steps[ours], theirs: steps[theirs]}
        seconds = side_by_side(pair, repeats=repeats)
        for unit, numbers, wanted in (("s", seconds, time_wanted), ("B", memory, memory_wanted)):
            found.append(
                {
                    "what": f"{ours}: {theirs}",
                    "kilodelta": numbers[ours],
                    "opponent": numbers[theirs],
                    "ratio": numbers[ours] / numbers[theirs],
                    "wanted": wanted,
                    "unit": unit,
                }
            )
    return found


def _memory(model: str, method: str, threads: int) -> int:
    """Peak bytes of two steps above the loaded model, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_memory_child, args=(model, method, threads, sender))
    process.start()
    sender.close()
    found: int = receiver.recv()
    process.join()
    return found


def _memory_child(model: str, method: str, threads: int, sender: Any) -> None:
    import peft  # noqa: F401  whoever needs it: its code is no part of a step

    from kilodelta.exact.selftest import require_good_kernels

    torch.set_num_threads(threads)
    require_good_kernels()  # loads the compiled kernels, which are no part of a step either
    base = MODELS[model]()
    with torch.no_grad():
        base(torch.ones(TEXTS, TOKENS, dtype=torch.int64))  # the libraries' own workspaces
    with peak_memory() as peak:
        before = peak()
        trained = step(METHODS[method](base))
        trained()
        trained()
    sender.send(peak() - before)


def _print(report: dict[str, Any]) -> None:
    for name, value in report["machine"].items():
        print(f"{name:10} {value}")
    print(f"threads    {report['threads']}")
    for model, found in report["models"].items():
        print(f"\n{model}, {TEXTS} x {TOKENS} tokens, {(MODELS[model].__doc__ or '').strip()}")
        print(f"{'ratio':>7}  {'wanted':>7}  {'kilodelta':>11}  {'opponent':>11}  what")
        for row in found:
            unit, factor = ("ms", 1e3) if row["unit"] == "s" else ("MB", 1e-6)
            ours, theirs = row["kilodelta"] * factor, row["opponent"] * factor
            wanted = row["wanted"]
            verdict = "" if wanted is None or row["ratio"] <= wanted else "  MISSED"
            print(
                f"{row['ratio']:>6.2f}x  {'' if wanted is None else f'<={wanted:>5.2f}':>7}"
                f"  {ours:>8.1f} {unit}  {theirs:>8.1f} {unit}  {row['what']}{verdict}"
            )


if __name__ == "__main__":
    main()
