"""What models are fed with: arrays, texts and labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.files.npz import write_npz
from tests.fuzz.containers import npz_changed
from tests.fuzz.harness import Read, Surface
from tests.fuzz.mutations import Mutate, json_lines_changed, lines_changed

TEXTS = ("a river runs past the old mill", "seven birds watch", "rain", "the quiet garden", "é ☂ x")


def _inputs(name: str, write: Callable[[Path], object]) -> Callable[[Path, Path], Read]:
    def make(example: Path, trusted: Path) -> Read:
        from kilodelta.models import open_model, read_inputs
        from tests.support import pico

        loaded = open_model(pico.bert(trusted / "model"))
        write(example / name)
        return lambda work: read_inputs(work / name, loaded, limit=8)

    return make


def _labels(example: Path, trusted: Path) -> Read:
    from kilodelta.models import open_model, read_texts, tokenize
    from tests.support import pico

    loaded = open_model(pico.bert(trusted / "model"))
    (example / "labels.txt").write_text("\n".join(TEXTS))
    return lambda work: tokenize(loaded, read_texts(work / "labels.txt")[:100])


def _arrays(path: Path) -> None:
    ids = np.arange(12, dtype=np.int64).reshape(2, 6)
    write_npz(path, {"input_ids": ids, "attention_mask": np.ones_like(ids)})


def _records(path: Path) -> None:
    path.write_text("".join(f'{{"text": "{text}", "id": {i}}}\n' for i, text in enumerate(TEXTS)))


def _surface(name: str, make: Any, suffix: str, mutate: Mutate) -> Surface:
    return Surface(
        name=name, make=make, mutate={f"*.{suffix}": (mutate,)}, needs=("torch", "transformers")
    )


SURFACES = (
    _surface("npz", _inputs("x.npz", _arrays), "npz", npz_changed),
    _surface("jsonl", _inputs("x.jsonl", _records), "jsonl", json_lines_changed),
    _surface(
        "txt",
        _inputs("x.txt", lambda path: path.write_text("\n".join(TEXTS))),
        "txt",
        lines_changed,
    ),
    _surface("labels", _labels, "txt", lines_changed),
)
