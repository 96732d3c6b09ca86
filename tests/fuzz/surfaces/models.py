"""`.kd` files, bases, sharded folders, and the JSON of Hugging Face folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import kilodelta
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.file import load
from kilodelta.report.card import card
from kilodelta.verify.digests.proof import prove
from tests.fuzz.containers import kd_changed, safetensors_changed
from tests.fuzz.harness import Read, Surface
from tests.fuzz.mutations import bytes_changed, json_changed
from tests.support import making
from tests.support.processes import GOLDEN

BASE = GOLDEN / "base.safetensors"
TENSORS = (safetensors_changed,)
JSON = (json_changed, json_changed, bytes_changed)


def _kd(example: Path, trusted: Path) -> Read:
    """One file of each method; which of them is damaged is drawn."""
    for path in GOLDEN.glob("*.kd"):
        shutil.copy(path, example)
    pristine = {path.name: path.read_bytes() for path in example.iterdir()}
    warm: list[bool] = []

    def read(work: Path) -> None:
        for path in sorted(work.iterdir()):
            if warm and path.is_file() and pristine[path.name] == path.read_bytes():
                continue
            contents = kilodelta.inspect(path).to_json()
            json.dumps(contents, allow_nan=False)
            card(contents)
            delta = load(path, base=BASE)
            for target in delta.targets:
                delta.expand(target)
            prove(BASE, path)
        warm.append(True)

    return read


def _base(example: Path, trusted: Path) -> Read:
    shutil.copy(BASE, example)
    delta = shutil.copy(GOLDEN / "nola-8.kd", trusted)

    def read(work: Path) -> None:
        place = work / BASE.name
        known = kilodelta.digest(place)
        json.dumps(dict(known.tensors))
        prove(place, delta)
        kilodelta.merge(place, delta, work / "merged.safetensors", threads=1)

    return read


def _index(example: Path, trusted: Path) -> Read:
    base = making.folder(example / "base", making.model(), shards=3)
    delta = trusted / "task.kd"
    making.delta(base, making.METHODS[0]).save(delta)

    def read(work: Path) -> None:
        Checkpoint.open(work / "base")
        kilodelta.merge(work / "base", delta, work / "merged", threads=1)

    return read


def _folder(example: Path, trusted: Path) -> Read:
    """A Hugging Face folder as its commands open it: configuration, tokenizer, pooling."""
    from kilodelta.models import open_model
    from kilodelta.models.inputs.read import tokenize
    from tests.support import pico

    pico.sentence_bert(example / "model", layers=1)

    def read(work: Path) -> None:
        loaded = open_model(work / "model")
        if loaded.tokenizer is not None:
            tokenize(loaded, ["a river runs", "rain"])

    return read


SURFACES = (
    Surface(name="kd", make=_kd, mutate={"*.kd": (kd_changed,)}),
    Surface(name="base", make=_base, mutate={"*.safetensors": TENSORS}),
    Surface(name="index", make=_index, mutate={"*.json": JSON, "*.txt": (bytes_changed,)}),
    Surface(
        name="model-json",
        make=_folder,
        mutate={"*.json": (json_changed,)},
        needs=("torch", "transformers"),
    ),
)
