"""What models are fed with: arrays, texts, labels, images and sounds."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.files.npz import write_npz
from tests.fuzz.containers import npz_changed
from tests.fuzz.harness import Read, Surface
from tests.fuzz.mutations import (
    Mutate,
    bytes_changed,
    json_changed,
    json_lines_changed,
    lines_changed,
)

IMAGES, SOUNDS = ("bmp", "gif", "jpg", "png", "tif", "webp"), ("wav", "flac", "ogg")
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


def _media(example: Path, trusted: Path) -> Read:
    """Images of all formats, sounds, and a processor's configuration, as a folder of inputs is."""
    from PIL import Image
    from transformers import ViTImageProcessor

    from kilodelta.models import open_model, read_inputs
    from kilodelta.models.media.sounds import read_sound
    from tests.support import pico

    soundfile: Any = importlib.import_module("soundfile")  # without types

    loaded = open_model(pico.vit(trusted / "model"))
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(example / "model")
    (example / "photos").mkdir()
    chance = np.random.default_rng(0)
    picture = Image.fromarray(chance.integers(0, 256, (12, 20, 3), dtype=np.uint8))
    upright = Image.Exif()
    upright[0x0112] = 6
    for suffix in IMAGES:
        picture.save(example / "photos" / f"a.{suffix}", exif=upright)
    for suffix in SOUNDS:
        soundfile.write(example / f"a.{suffix}", chance.uniform(-0.1, 0.1, (900, 2)), 8000)

    def read(work: Path) -> None:
        for suffix in SOUNDS:
            read_sound(work / f"a.{suffix}", 16_000, "x")
        read_inputs(work / "photos", replace(loaded, source=str(work / "model")))

    return read


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
    Surface(
        name="media",
        make=_media,
        mutate={
            "*.json": (json_changed,),
            **{f"*.{s}": (bytes_changed,) for s in (*IMAGES, *SOUNDS)},
        },
        needs=("torch", "transformers", "PIL", "soundfile"),
    ),
)
