"""The folder in which the pages' commands run: small models and files under the names they use.

One encoder with sentence pooling (`base`), its fine-tune, texts, labels, deltas, adapters, a small
Llama, and classifiers with heads of their own, each random and some kilobytes large.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid.quantise import quantise_folder
from tests.support import making, pico
from tests.support.processes import ROOT

LAYERS = Patterns(include=("encoder.*.weight",), exclude=("*LayerNorm*",))
ROWS = 48
WIDTH = 256
"""So wide that a budget of 12 KB affords rank 8, which a bundle takes by default, and no more."""


def lay(desk: Path) -> Path:
    """Write everything; return the folder."""
    (desk / "tests").symlink_to(ROOT / "tests")
    pico.sentence_bert(desk / "base", width=WIDTH, layers=1)
    pico.tuned(desk / "base", desk / "tuned", size=0.05)
    _texts(desk)
    quantise_folder(desk / "base", desk / "base-w4a16", "int4-g128", _is_attention)
    pico.llama(desk / "llama")
    _deltas(desk)
    _heads(desk)
    _adapter(desk)
    _fleet(desk)
    return desk


def _is_attention(name: str) -> bool:
    """Whether a name is of a matrix whose rows are a multiple of the blocks' 128 weights."""
    return ".attention." in name and name.endswith(".weight") and "LayerNorm" not in name


def copy(desk: Path, to: Path) -> Path:
    """Copy the folder for a page, so that pages do not see each other's results."""
    return Path(shutil.copytree(desk, to, symlinks=True))


def _texts(desk: Path) -> None:
    chance = random.Random(0)
    words = sorted(set(pico.WORDS.split()))
    texts = [" ".join(chance.sample(words, chance.randint(3, 9))) for _ in range(ROWS)]
    (desk / "texts.txt").write_text("\n".join(texts) + "\n")
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    for name in ("texts", "train", "test"):
        (desk / f"{name}.jsonl").write_text("".join(rows))
    (desk / "labels.txt").write_text("a river\nseven birds\nthe old mill\nrain\n")
    ids = np.array([[2, 5, 6, 3]], np.int64)
    for name, count in (("inputs", 1), ("two-rows", 2)):
        batch = np.repeat(ids, count, 0)
        np.savez(desk / f"{name}.npz", input_ids=batch, attention_mask=np.ones_like(batch))


def _deltas(desk: Path) -> None:
    for seed, name in enumerate(("task", "other", "a", "b", "c")):
        made = making.delta(desk / "base", Lora(rank=4), patterns=LAYERS, seed=seed + 1)
        made.save(desk / f"{name}.kd")
    patterns = Patterns(include=("model.layers.*_proj.weight",))
    making.delta(desk / "llama", Lora(rank=4), patterns=patterns).save(desk / "chat.kd")


def _heads(desk: Path) -> None:
    """`intents.kd` and `topics.kd` bring heads of 5 and 40 labels; `cls.kd` does not say whose."""
    for name, labels, says in (("intents", 5, True), ("topics", 40, True), ("cls", 3, False)):
        rng = np.random.default_rng(labels)
        shapes = {"classifier.weight": (labels, WIDTH), "classifier.bias": (labels,)}
        extras = {
            key: RawTensor.copy_of(rng.normal(size=shape).astype(np.float32))
            for key, shape in shapes.items()
        }
        made = making.delta(
            desk / "base", Lora(rank=4), patterns=LAYERS, seed=labels, extras=extras
        )
        config = {
            "architectures": ["BertForSequenceClassification"],
            "id2label": {str(index): f"L{index}" for index in range(labels)},
            "label2id": {f"L{index}": index for index in range(labels)},
        }
        manifest = replace(made.manifest, config=config if says else {})
        replace(made, manifest=manifest).save(desk / f"{name}.kd")


def _adapter(desk: Path) -> None:
    import peft

    from tests.support import adapters

    config = peft.LoraConfig(r=4, target_modules=["query", "value"])
    model = adapters.wrap(desk / "base", "bert", config)
    for name in ("adapter", "adapter_dir"):
        adapters.save(model, desk / name)


def _fleet(desk: Path) -> None:
    """Under `many/`: two fine-tunes with their texts and labels, and a ready file."""
    many = desk / "many"
    for kind in ("tuned", "inputs", "labels", "ready"):
        (many / kind).mkdir(parents=True)
    shutil.copytree(desk / "base", many / "base")
    shutil.copy(desk / "texts.jsonl", many)
    shutil.copy(desk / "task.kd", many / "ready")
    for name in ("intents", "topics"):
        shutil.copytree(desk / "tuned", many / "tuned" / name)
        shutil.copy(desk / "texts.jsonl", many / "inputs" / f"{name}.jsonl")
        shutil.copy(desk / "labels.txt", many / "labels" / f"{name}.txt")


def names(desk: Path) -> dict[str, Any]:
    """Return what the pages' Python blocks take for given: a batch, a folder, a model."""
    from transformers import AutoModel

    ids = np.array([[2, 5, 6, 3], [2, 7, 8, 3], [2, 9, 4, 3], [2, 5, 4, 3]], np.int64)
    mask = np.ones_like(ids)
    (desk / "graph").mkdir(exist_ok=True)
    return {
        "np": np,
        "Path": Path,
        "folder": Path("graph"),
        "ids": ids,
        "mask": mask,
        "batch": {"input_ids": ids, "attention_mask": mask},
        "model": AutoModel.from_pretrained(desk / "base"),
    }
