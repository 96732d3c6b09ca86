"""What kilobytes keep of a fine-tune: all-MiniLM-L6-v2 on TREC-6 and Banking77.

    python benchmarks/fidelity.py [--data DIR] [--work DIR] [--json FILE] [--sets ...] [--seeds ...]

For each set and seed a teacher is fine-tuned in full; then `compress` gets base, teacher and the
training texts without labels, and a budget. What is printed is the test accuracy of the merged
files, their size on disk, and beside them, in the same run:

- the base, the teacher, and a linear probe (logistic regression on the base's embeddings);
- the truncated SVD of the change with 4-bit factors, at the same and at ten times the bytes;
- LoRA r = 1 with 4-bit factors, distilled in the same way.

Every finished cell is kept in the work folder, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fidelity_svd import merge_svd
from fidelity_task import (
    Task,
    accuracy,
    base_folder,
    embed_all,
    open_encoder,
    read_task,
    train_teacher,
)
from machine import describe

import kilodelta
from kilodelta.compress import Options, compress
from kilodelta.format.methods import Lora

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = ("trec6", "banking77")
BUDGETS = {"4KB": 4_000, "12KB": 12_000, "25KB": 25_000, "50KB": 50_000}
GOALS = {
    "trec6": {
        "4KB": (93.5, 95.5),
        "12KB": (94.5, 96.0),
        "25KB": (95.5, 96.5),
        "50KB": (96.0, 96.6),
    },
    "banking77": {
        "4KB": (82.5, 86.0),
        "12KB": (88.0, 90.0),
        "25KB": (90.0, 91.0),
        "50KB": (90.5, 91.7),
    },
}
"""Floor and goal of the test accuracy, in per cent."""


def main() -> None:
    """Run what is not there yet, and print one table a set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the two sets")
    parser.add_argument("--work", type=Path, default=Path("fidelity"), help="teachers and files")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    options = parser.parse_args()
    report = {
        "machine": describe(),
        "threads": torch.get_num_threads(),
        "sets": {
            name: {
                str(seed): _run(options.data / f"{name}.jsonl.gz", options.work, seed)
                for seed in options.seeds
            }
            for name in options.sets
        },
    }
    _print(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """One set and seed: its folder, and how a folder's encoder does on the test texts."""

    task: Task
    place: Path
    seed: int

    @property
    def teacher(self) -> Path:
        return self.place / "teacher"

    def head(self) -> torch.Tensor:
        return embed_all(*open_encoder(base_folder()), self.task.names)

    def accuracy(self, folder: Path) -> float:
        embeddings = embed_all(*open_encoder(folder), self.task.test.texts)
        return accuracy(embeddings, self.head(), self.task.test.labels)

    def cell(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A cell's numbers: those that an earlier run kept, else computed now."""
        kept = self.place / f"{name}.json"
        if not kept.exists():
            print(f"{self.task.name}, seed {self.seed}: {name} ...", flush=True)
            kept.write_text(json.dumps(compute()))
        found: dict[str, Any] = json.loads(kept.read_text())
        return found


def _run(data: Path, work: Path, seed: int) -> dict[str, Any]:
    task = read_task(data)
    bench = _Bench(task=task, place=work / f"{task.name}-{seed}", seed=seed)
    bench.place.mkdir(parents=True, exist_ok=True)
    (bench.place / "inputs.txt").write_text("\n".join(task.train.texts) + "\n")
    (bench.place / "labels.txt").write_text("\n".join(task.names) + "\n")
    cells = {
        "teacher": bench.cell("teacher", lambda: _teacher(bench)),
        "base": bench.cell("base", lambda: {"accuracy": bench.accuracy(base_folder())}),
        "probe": bench.cell("probe", lambda: {"accuracy": _probe(task)}),
        "lora-r1-int4": bench.cell(
            "lora-r1-int4", lambda: _compress(bench, "lora-r1-int4", method=Lora(rank=1), bits=4)
        ),
    }
    for name, budget in BUDGETS.items():
        cells[name] = bench.cell(name, lambda n=name, b=budget: _compress(bench, n, budget=b))  # type: ignore[misc]
        for times in (1, 10):
            svd, limit = f"svd-int4-{times}x{name}", times * budget
            cells[svd] = bench.cell(svd, lambda b=limit: _svd(bench, b))  # type: ignore[misc]
    return cells


def _teacher(bench: _Bench) -> dict[str, Any]:
    if not bench.teacher.exists():
        train_teacher(bench.task, bench.teacher, bench.seed)
    return {"accuracy": bench.accuracy(bench.teacher)}


def _probe(task: Task) -> float:
    from sklearn.linear_model import LogisticRegression

    model, tokenizer = open_encoder(base_folder())
    train, test = (embed_all(model, tokenizer, part.texts) for part in (task.train, task.test))
    probe = LogisticRegression(C=10.0, max_iter=2000).fit(train.numpy(), task.train.labels.numpy())
    return 100 * float(probe.score(test.numpy(), task.test.labels.numpy()))


def _compress(bench: _Bench, name: str, **chosen: Any) -> dict[str, Any]:
    """A file as `kilodelta compress` makes it, merged and tested."""
    file, merged = bench.place / f"{name}.kd", bench.place / f"{name}-merged"
    options = Options(
        labels=str(bench.place / "labels.txt"), max_length=48, seed=bench.seed, **chosen
    )
    began = time.monotonic()
    report = compress(
        base_folder(),
        bench.teacher,
        file,
        inputs=bench.place / "inputs.txt",
        options=options,
        force=True,
    )
    seconds = time.monotonic() - began
    shutil.rmtree(merged, ignore_errors=True)  # of a run that was interrupted here
    kilodelta.merge(base_folder(), file, merged)
    return {
        "accuracy": bench.accuracy(merged),
        "bytes": file.stat().st_size,
        "seconds": seconds,
        "steps": report.steps,
        "method": dict(report.method),
        "bits": report.bits,
        "held_out_agreement": report.after.agreement if report.after else None,
    }


def _svd(bench: _Bench, budget: int) -> dict[str, Any]:
    model, tokenizer = open_encoder(base_folder())
    spent = merge_svd(model, open_encoder(bench.teacher)[0], budget)
    embeddings = embed_all(model, tokenizer, bench.task.test.texts)
    found = accuracy(embeddings, bench.head(), bench.task.test.labels)
    return {"accuracy": found, "bytes": spent}


def _print(report: Mapping[str, Any]) -> None:
    print(f"\n{report['machine']}, {report['threads']} threads")
    for name, seeds in report["sets"].items():
        _print_set(name, list(seeds.values()))


def _print_set(name: str, seeds: list[dict[str, Any]]) -> None:
    def both(cell: str, key: str = "accuracy", form: str = "{:.1f}") -> str:
        return " / ".join(form.format(cells[cell][key]) for cells in seeds)

    print(f"\n{name}: test accuracy in %, one number a seed")
    for cell in ("base", "probe", "teacher"):
        print(f"  {cell:<9} {both(cell)}")
    print(
        f"  LoRA r = 1, int4: {both('lora-r1-int4')} in {both('lora-r1-int4', 'bytes', '{}')} bytes"
    )
    line = "  {:<5} {:>14} {:>13} {:>12} {:>12} {:>14} {:>14} {:>11}  {}"
    print(
        line.format(
            "at most",
            "accuracy",
            "floor / goal",
            "bytes",
            "x smaller",
            "SVD int4",
            "SVD at 10x",
            "seconds",
            "method",
        )
    )
    for budget, (floor, goal) in GOALS[name].items():
        print(
            line.format(
                budget,
                both(budget),
                f"{floor} / {goal}",
                both(budget, "bytes", "{}"),
                f"{90_900_000 / seeds[0][budget]['bytes']:,.0f}",
                both(f"svd-int4-1x{budget}"),
                both(f"svd-int4-10x{budget}"),
                both(budget, "seconds", "{:.0f}"),
                " ".join(str(v) for v in seeds[0][budget]["method"].values()),
            )
        )


if __name__ == "__main__":
    main()
