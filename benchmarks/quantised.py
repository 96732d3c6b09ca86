"""What a fine-tune keeps on a quantised base: all-MiniLM-L6-v2 on TREC-6 and Banking77.

    python benchmarks/quantised.py [--data DIR] [--work DIR] [--json FILE] [--sets ..] [--seeds ..]
    python benchmarks/quantised.py --sets smollm2 --bases DIR --gguf FILE    # quantised_decoder.py

For each set and seed a teacher is fine-tuned in full, and `compress --for fp32,<the precisions>`
makes one 12 KB file of it on texts without labels, against the float base and through the grids'
rounding. For each precision (our own quantiser, 36 matrices) the table holds the test accuracy of

- the base on the grid;
- the file beside it (exact update, untouched codes) and merged in its grid, and the float merge;
- the full fine-tune merged in the grid (scales kept), and quantised anew from float;

and the share of codes that change. Finished cells are kept in the work folder, so that an
interrupted run goes on; with `--minutes` it interrupts itself after so long, and ends with code 75.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from kilodelta.grid import QuantisedModel, open_quantised
from kilodelta.grid.precisions import PRECISIONS, with_steps
from kilodelta.grid.quantise import quantise_folder
from kilodelta.merging.rebase import rebased

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SETS = ("trec6", "banking77")
DECODER = "smollm2"
AGAIN = 75
"""The exit code where `--minutes` ended the training: EX_TEMPFAIL of sysexits.h."""
ROWS = (
    ("base", "base"),
    ("beside", "12 KB beside"),
    ("in-grid", "12 KB in the grid"),
    ("full-in-grid", "full fine-tune in the grid"),
    ("full-quantised", "full fine-tune, quantised anew"),
)
Weights = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


def main() -> None:
    """Run what is not there yet, and print one table a set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the two sets")
    parser.add_argument("--work", type=Path, default=Path("quantised"), help="teachers and files")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--sets", nargs="+", choices=(*SETS, DECODER), default=SETS)
    parser.add_argument("--bases", type=Path, help="for smollm2: the folder of its float folder")
    parser.add_argument("--gguf", type=Path, help="for smollm2: the packaged file")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=("int4-g32", "nvfp4")
    )
    parser.add_argument("--steps", type=int, help="of the distillation; fewer to try the script")
    parser.add_argument("--rate", type=float, help="of the distillation of smollm2")
    parser.add_argument("--minutes", type=float, help="interrupt the training then, to go on later")
    options = parser.parse_args()
    if options.minutes:
        _interrupt_after(options.minutes)
    report: dict[str, Any] = {"machine": describe(), "threads": torch.get_num_threads(), "sets": {}}
    for seed in options.seeds:  # all sets once first, so that an early end leaves whole columns
        for name in options.sets:
            cells = _cells(name, seed, options)
            report["sets"].setdefault(name, {})[str(seed)] = cells
            if options.json:
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    _print(report)


def _cells(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Compute one set and seed; ends the run where the training was interrupted."""
    if name != DECODER:
        bench = Bench(read_task(options.data / f"{name}.jsonl.gz"), options.work, seed)
        return bench.run(options.precisions, options.steps)
    from quantised_decoder import DecoderBench

    decoder = DecoderBench(options.bases, options.gguf, options.data, options.work, seed)
    cells = decoder.run(options.steps, options.rate)
    if cells is None:
        sys.exit(AGAIN)
    return cells


def _interrupt_after(minutes: float) -> None:
    """Let Ctrl-C arrive after some minutes, in the background as well, where it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes)


def is_matrix(name: str) -> bool:
    """Whether a tensor of the encoder is one of the 36 that are quantised."""
    return (name.startswith("encoder.layer.") and name.endswith("dense.weight")) or any(
        name.endswith(f"self.{part}.weight") for part in ("query", "key", "value")
    )


@dataclass
class Bench:
    """One set and seed, with its folder of finished cells."""

    task: Task
    work: Path
    seed: int

    @property
    def place(self) -> Path:
        return self.work / f"{self.task.name}-{self.seed}"

    def run(self, precisions: list[str], steps: int | None) -> dict[str, Any]:
        """Compute all cells."""
        self.place.mkdir(parents=True, exist_ok=True)
        (self.place / "inputs.txt").write_text("\n".join(self.task.train.texts) + "\n")
        (self.place / "labels.txt").write_text("\n".join(self.task.names) + "\n")
        teacher, file = self.place / "teacher", self.place / "12KB.kd"
        if not teacher.exists():
            train_teacher(self.task, teacher, self.seed)
        began = time.monotonic()
        resume = file.with_name(f"{file.name}.resume").exists()
        if resume or not file.exists():
            options = Options(
                labels=str(self.place / "labels.txt"),
                max_length=48,
                seed=self.seed,
                budget=12_000,
                precisions=("fp32", *precisions),
            )
            if steps is not None:
                options = replace(options, steps=steps)
            inputs = self.place / "inputs.txt"
            made = compress(
                base_folder(), teacher, file, inputs=inputs, options=options, resume=resume
            )
            if made.interrupted:
                sys.exit(AGAIN)
        seconds = round(time.monotonic() - began, 1)
        self.model, self.tokenizer = open_encoder(base_folder())
        self.head = embed_all(self.model, self.tokenizer, self.task.names)
        base, tuned = self.floats(base_folder()), self.floats(teacher)
        delta = kilodelta.load(file, base=base_folder())
        updates = {name: delta.update(name).astype(np.float64) for name in delta.targets}
        merged = {n: np.float32(base[n]) + np.float32(updates.get(n, 0)) for n in base}
        cells: dict[str, Any] = {
            "bytes": file.stat().st_size,
            "seconds": seconds,
            "made": dict(delta.manifest.made),
            "float": {
                "base": self.accuracy({}),
                "12KB": self.accuracy(merged),
                "teacher": self.test(teacher),
            },
        }
        for precision in precisions:
            cells[precision] = self.on_grid(precision, file, updates, tuned)
        return cells

    def floats(self, folder: Path) -> Weights:
        """The matrices of a float folder, float64 (out, in)."""
        model = kilodelta.Checkpoint.open(folder)
        return {
            name: model.raw(name).values().astype(np.float64)
            for name in model.names
            if is_matrix(name)
        }

    def accuracy(self, weights: Mapping[str, Any], folder: Path | None = None) -> float:
        """Test a folder's encoder with some matrices exchanged, each rounded to float32."""
        model, _ = open_encoder(folder or base_folder())
        values = {n: torch.from_numpy(np.asarray(w, np.float32)) for n, w in weights.items()}
        assert not model.load_state_dict(values, strict=False).unexpected_keys
        embeddings = embed_all(model, self.tokenizer, self.task.test.texts)
        return accuracy(embeddings, self.head, self.task.test.labels)

    def test(self, folder: Path) -> float:
        """Test the encoder of a float folder."""
        embeddings = embed_all(*open_encoder(folder), self.task.test.texts)
        return accuracy(embeddings, self.head, self.task.test.labels)

    def on_grid(
        self, precision: str, file: Path, updates: Weights, tuned: Weights
    ) -> dict[str, Any]:
        """All cells of one precision."""
        kept = self.place / f"{precision}.json"
        if kept.exists():
            found: dict[str, Any] = json.loads(kept.read_text())
            return found
        quantised, merged = self.place / precision, self.place / f"{precision}-merged"
        for folder in (quantised, merged):
            shutil.rmtree(folder, ignore_errors=True)
        quantise_folder(base_folder(), quantised, precision, is_matrix)
        on_grid, _ = rebased(kilodelta.load(file), open_quantised(quantised))
        done = kilodelta.merge(quantised, on_grid, merged, min_changed=0)
        model = open_quantised(quantised)
        values = exact(model)
        full = {n: with_steps(model.matrix(n), tuned[n]) for n in values}
        anew = {n: PRECISIONS[precision].make(tuned[n]).values() for n in values}
        changed = sum(int((m.codes != model.matrix(n).codes).sum()) for n, m in full.items())
        # A full fine-tune brings its own norms, biases and embeddings, which are not quantised.
        teacher = self.place / "teacher"
        cells = {
            "base": self.accuracy(values),
            "beside": self.accuracy({n: w + updates.get(n, 0) for n, w in values.items()}),
            "in-grid": self.accuracy(exact(open_quantised(merged))),
            "full-in-grid": self.accuracy({n: m.values() for n, m in full.items()}, teacher),
            "full-quantised": self.accuracy(anew, teacher),
            "codes changed": 100 * done.codes_changed / done.codes,
            "codes changed, full": 100 * changed / done.codes,
        }
        kept.write_text(json.dumps(cells))
        return cells


def exact(model: QuantisedModel) -> Weights:
    """The exact values of all quantised weights."""
    return {name: model.matrix(name).values() for name in model.stored}


def _print(report: Mapping[str, Any]) -> None:
    print(f"\n{report['machine']}, {report['threads']} threads; accuracy in %, by seed")
    for name, seeds in report["sets"].items():
        if name == DECODER:
            from quantised_decoder import print_table

            print_table(seeds)
            continue
        cells = list(seeds.values())
        print(f"\n## {name}\n")
        for row, label in (("base", "base"), ("12KB", "12 KB merged"), ("teacher", "full")):
            print(f"float, {label}: " + " / ".join(f"{c['float'][row]:.1f}" for c in cells))
        for precision in (key for key in cells[0] if key in PRECISIONS):
            print(f"\n| {precision} | accuracy | codes changed |\n|---|---|---|")
            for row, label in ROWS:
                share = {"in-grid": "codes changed", "full-in-grid": "codes changed, full"}.get(row)
                both = " / ".join(f"{c[precision][row]:.1f}" for c in cells)
                codes = " / ".join(f"{c[precision][share]:.2f} %" for c in cells) if share else ""
                print(f"| {label} | {both} | {codes} |")


if __name__ == "__main__":
    main()
