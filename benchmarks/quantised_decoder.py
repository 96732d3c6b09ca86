"""What one file keeps on SmolLM2-135M as it is packaged: GGUF, Q4_1 and Q8_0 blocks.

`python benchmarks/quantised.py --sets smollm2 --bases DIR --gguf FILE` runs it. The teacher is a
full fine-tune of the same values as floats (`tasks.decoder`: TREC-6, answered in words), and one
file is trained by turns for the merge in the grid and for the update beside it. Of each way to use
it the table holds exact matches on 150 test questions, the loss of an answer, and the share of the
fine-tune's gain.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import train_teacher
from tasks.decoder import Decoder

import kilodelta
from kilodelta.compress import Options, compress
from kilodelta.grid import QuantisedModel
from kilodelta.grid.open import open_named
from kilodelta.grid.precisions import with_steps

ROWS = (
    ("base", "the base"),
    ("in-grid", "merged in the grid"),
    ("beside", "beside the quantised base"),
    ("float", "merged into the base's values as floats"),
    ("teacher", "full fine-tune"),
    ("full-in-grid", "full fine-tune in the grid, scales kept"),
)
_EMBEDDING = "model.embed_tokens.weight"
Floats = np.ndarray[Any, np.dtype[np.float64]]


class DecoderBench:
    """One seed, with its folder of finished cells.

    Args:
        bases: holds the folder `smollm2` that `smollm2.py` writes: the GGUF file's values.
        gguf: the file itself.
        data: the folder with the set.
        work: where teacher, file and cells are kept.
        seed: of teacher and file.
    """

    def __init__(self, bases: Path, gguf: Path, data: Path, work: Path, seed: int) -> None:
        self.place, self.gguf, self.seed = work / f"smollm2-{seed}", gguf, seed
        self.place.mkdir(parents=True, exist_ok=True)
        self.task = Decoder(bases=bases, data=data, place=self.place, seed=seed)
        self.base, self.teacher = self.task.base(), self.place / "teacher"
        self.file, self.merged = self.place / "50KB.kd", self.place / "merged.gguf"

    def run(self, steps: int | None, rate: float | None) -> dict[str, Any] | None:
        """Compute all cells; None if the training was interrupted."""
        if not self.teacher.exists():
            train_teacher(self.task, self.base, self.teacher, self.seed)
        seconds = self._seconds(steps, rate)
        if seconds is None:
            return None
        cells: dict[str, Any] = {
            "bytes": self.file.stat().st_size,
            "seconds": seconds,
            "made": dict(kilodelta.load(self.file).manifest.made),
        }
        for name, values in self._ways().items():
            cells[name] = self._cell(name, values)
        return {**cells, **json.loads((self.place / "changed.json").read_text())}

    def _seconds(self, steps: int | None, rate: float | None) -> float | None:
        """Compress, or go on with it; return the seconds that this run of it took."""
        kept, began = self.place / "seconds.json", time.monotonic()
        resume = self.file.with_name(f"{self.file.name}.resume").exists()
        before = json.loads(kept.read_text()) if kept.exists() else 0.0
        if resume or not self.file.exists():
            options = Options(
                budget=self.task.budget,
                seed=self.seed,
                extras="none",
                exclude=(_EMBEDDING,),
                precisions=("in-grid", "beside"),
                teacher_cache=str(self.place / "cache"),
                **self.task.options,
            )
            if steps is not None:
                options = replace(options, steps=steps)
            if rate is not None:
                options = replace(options, rate=rate)
            made = compress(
                self.gguf, self.teacher, self.file,
                inputs=self.task.inputs(), options=options, resume=resume,
            )  # fmt: skip
            before += time.monotonic() - began
            kept.write_text(json.dumps(before))
            if made.interrupted:
                return None
        return round(before, 1)

    def _ways(self) -> Mapping[str, Callable[[str], Floats | None]]:
        """By cell, the value of each quantised weight; None for the base's own."""
        delta = kilodelta.load(self.file).bind(self.model)
        tuned = kilodelta.Checkpoint.open(self.teacher)

        def update(name: str) -> Floats:
            return delta.update(name).astype(np.float64)

        def beside(name: str) -> Floats | None:
            return self._value(name) + update(name) if name in delta.targets else None

        def as_floats(name: str) -> Floats | None:
            if name not in delta.targets:
                return None
            merged = self._value(name).astype(np.float32) + delta.update(name)
            return np.asarray(merged, np.float64)

        def in_grid(name: str) -> Floats | None:
            return self._merged.matrix(name).values() if name in delta.targets else None

        def full(name: str) -> Floats:
            values = tuned.raw(name).values().astype(np.float64)
            return with_steps(self.model.matrix(name), values).values()

        return {
            "base": lambda name: None,
            "teacher": lambda name: None,
            "in-grid": in_grid,
            "beside": beside,
            "float": as_floats,
            "full-in-grid": full,
        }

    @cached_property
    def model(self) -> QuantisedModel:
        """The base as it is packaged."""
        return open_named(self.gguf)

    @cached_property
    def _merged(self) -> QuantisedModel:
        if not self.merged.exists():
            done = kilodelta.merge(self.gguf, self.file, self.merged, min_changed=0)
            changed = {"codes changed": 100 * done.codes_changed / done.codes}
            (self.place / "changed.json").write_text(json.dumps(changed))
        return open_named(self.merged)

    def _value(self, name: str) -> Floats:
        return self.model.matrix(name).values()

    @torch.no_grad()
    def _cell(self, name: str, values: Callable[[str], Floats | None]) -> dict[str, float]:
        """Test the base, or the teacher, with some matrices exchanged, each rounded to float32.

        A full fine-tune brings its own norms, which are not quantised.
        """
        kept = self.place / f"{name}.json"
        if kept.exists():
            found: dict[str, float] = json.loads(kept.read_text())
            return found
        own = name in ("teacher", "full-in-grid")
        module = self.task.open(self.teacher if own else self.base)
        state = module.state_dict()
        for weight in self.model.stored:
            new = values(weight)
            if new is not None:
                state[weight].copy_(torch.from_numpy(new.astype(np.float32)))
        figures = self.task.score(module)
        kept.write_text(json.dumps(figures))
        print(f"{self.place.name}: {name} {figures}", flush=True)
        return figures


def print_table(seeds: Mapping[str, Mapping[str, Any]]) -> None:
    """Print all cells, and axolotl's triple: the gain recovered merged, beside and as floats."""
    for cells in seeds.values():
        low, high = cells["base"], cells["teacher"]
        print(
            f"\n## smollm2, {cells['bytes']} bytes, {cells['codes changed']:.1f} % of the codes\n"
        )
        print("| | exact match | share of the gain | loss | share |\n|---|---|---|---|---|")
        for name, label in ROWS:
            shares = [recovered(cells[name], low, high, key) for key in ("score", "loss")]
            print(
                f"| {label} | {cells[name]['score']:.1f} | {100 * shares[0]:.0f} %"
                f" | {cells[name]['loss']:.3f} | {100 * shares[1]:.0f} % |"
            )
        triple = (recovered(cells[n], low, high, "score") for n in ("in-grid", "beside", "float"))
        print("\nrecovery merged / beside / float: " + " / ".join(f"{x:.2f}" for x in triple))


def recovered(
    cell: Mapping[str, float], low: Mapping[str, float], high: Mapping[str, float], key: str
) -> float:
    """Return the share of the full fine-tune's gain over the base that a cell has, in one figure.

    Args:
        cell: whose share.
        low: the base's figures.
        high: the full fine-tune's.
        key: which figure.
    """
    return (cell[key] - low[key]) / (high[key] - low[key])
