"""Compress end to end on every kind of model: base, tuned and inputs in; the merged file out."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

import kilodelta
from kilodelta.compress import Options, compress
from kilodelta.errors import CheckpointError
from kilodelta.format.methods import Lora, Method, Nola, RandLora, UniLora
from kilodelta.models import LoadedModel, open_model, outputs, read_inputs
from kilodelta.verify.digests.proof import prove
from tests.support import pico

METHODS: Mapping[str, Method] = {
    "bert_classifier": Nola(rank=2, bases=64),
    "gpt2": UniLora(rank=2, bases=2000),
    "llama": Lora(rank=2),
    "vit": RandLora(rank=4),
    "resnet": Lora(rank=2),
}


def inputs(kind: str, folder: Path) -> Path:
    """Unlabelled inputs as a file: texts, or images as `.npz`."""
    if kind in ("vit", "resnet"):
        np.savez(folder / "images.npz", pixel_values=pico.pixels(96)["pixel_values"].numpy())
        return folder / "images.npz"
    words = pico.WORDS.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 5 + i % 6)) for i in range(96)]
    (folder / "texts.txt").write_text("\n".join(lines))
    return folder / "texts.txt"


@pytest.mark.parametrize("kind", METHODS)
def test_what_was_measured_is_what_the_merged_file_computes(kind: str, tmp_path: Path) -> None:
    base = pico.MODELS[kind](tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.05)
    options = Options(method=METHODS[kind], bits=8, steps=80, batch=16, held_out=32)
    file, given = tmp_path / "task.kd", inputs(kind, tmp_path)
    report = compress(base, tuned, file, inputs=given, options=options)
    assert report.before is not None
    assert report.after is not None
    assert report.after.divergence < report.before.divergence
    kilodelta.merge(base, file, tmp_path / "merged")
    assert prove(base, file, tmp_path / "merged").merged
    merged, there, here = (open_model(tmp_path / n) for n in ("merged", "tuned", "base"))
    assert _distance(merged, there, given) < _distance(here, there, given)


@torch.no_grad()
def _distance(model: LoadedModel, teacher: LoadedModel, file: Path) -> float:
    """How far the distributions over classes lie apart, where no padding is."""
    (batch,) = read_inputs(file, teacher, limit=32)
    ours, theirs = (outputs(m, batch)["logits"].softmax(-1) for m in (model, teacher))
    apart = (ours - theirs).square().sum(-1)
    return float((apart * batch["attention_mask"] if apart.dim() == 2 else apart).sum())


def test_tied_embeddings_of_a_decoder_are_one_target(tmp_path: Path) -> None:
    base = pico.gpt2(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.05)
    options = Options(method=Lora(rank=1), targets=("*wte.weight", "*attn.c_attn.weight"))
    report = compress(base, tuned, tmp_path / "task.kd", options=options)
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    turned = {name: target.transposed for name, target in delta.targets.items()}
    assert turned == {
        "transformer.h.0.attn.c_attn.weight": True,
        "transformer.h.1.attn.c_attn.weight": True,
        "transformer.wte.weight": False,
    }
    assert report.targets == 3


def test_statistics_of_batch_norm_travel_whole(tmp_path: Path) -> None:
    base = pico.resnet(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    name = next(name for name in tensors if name.endswith("running_mean"))
    tensors[name] += 0.5
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    images = inputs("resnet", tmp_path)
    options = Options(method=Lora(rank=1), steps=8, batch=16)
    report = compress(base, tuned, tmp_path / "task.kd", inputs=images, options=options)
    assert report.extras == (name,)
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(merged[name], tensors[name])


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_new_head_travels_whole_whatever_the_encoder_is_called(
    prefixed: bool, tmp_path: Path
) -> None:
    """A classifier made from an encoder: its tensors gain a prefix that the base's lack."""
    tuned = pico.bert_classifier(tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    encoder = {n: t for n, t in tensors.items() if not n.startswith("classifier")}
    if not prefixed:
        encoder = {n.removeprefix("bert."): t for n, t in encoder.items()}
    generator = torch.Generator().manual_seed(3)
    for name in sorted(n for n, t in encoder.items() if t.ndim == 2 and "encoder" in n):
        encoder[name] = encoder[name] + 0.05 * torch.randn(encoder[name].shape, generator=generator)
    base = tmp_path / "base"
    shutil.copytree(pico.bert(tmp_path / "bare"), base)
    save_file(encoder, base / "model.safetensors", {"format": "pt"})
    options = Options(method=Lora(rank=4), bits=8, steps=60, batch=16)
    report = compress(
        base, tuned, tmp_path / "task.kd", inputs=inputs("bert", tmp_path), options=options
    )
    assert report.extras == ("classifier.bias", "classifier.weight")
    assert report.kind == "top-1"
    assert report.before is not None
    assert report.after is not None
    assert report.after.divergence < report.before.divergence
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "merged")
    merged = open_model(tuned, weights=tmp_path / "merged")
    assert not merged.missing
    head = load_file(tmp_path / "task.kd")["extra.classifier.weight"]
    assert torch.equal(merged.module.state_dict()["classifier.weight"], head)


def test_a_hub_id_that_cannot_be_fetched_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        compress("hf:nobody/nothing", "hf:nobody/nothing", tmp_path / "task.kd")
