"""Train a model to start from, and count how often a model is right.

The classes cost no bytes: a text belongs to the class whose name its embedding is nearest to, by
the base model's embeddings of the names. So the whole fine-tune is in the encoder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from kilodelta.demo.task import Texts
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.models import LoadedModel, open_model, outputs, tokenize
from kilodelta.models.heads import EMBEDDING
from kilodelta.models.weights import tensor
from kilodelta.progress import Event, Progress, silent

BATCH = 32
SHARPNESS = 20.0
"""Cosines to the class names are multiplied by this to become logits."""
RATE = 1.5e-4
_WARM_UP = 0.1  # of all steps


def embed(model: LoadedModel, texts: Sequence[str], max_length: int) -> Tensor:
    """Embed texts, float32 (n, width), without gradients."""
    parts = (texts[start : start + 64] for start in range(0, len(texts), 64))
    with torch.inference_mode():
        return torch.cat([_embed(model, part, max_length) for part in parts])


def accuracy(model: LoadedModel, head: Tensor, part: Texts, max_length: int) -> float:
    """Return the share of texts that are nearest to their own class.

    Args:
        model: embeds the texts.
        head: the classes' embeddings, (classes, width).
        part: texts with their classes.
        max_length: tokens that texts are cut to.
    """
    nearest = (embed(model, part.texts, max_length) @ head.T).argmax(-1)
    return float((nearest == torch.tensor(part.labels)).double().mean())


def fine_tune(
    base: Path,
    out: Path,
    names: Sequence[str],
    part: Texts,
    *,
    steps: int,
    max_length: int,
    seed: int,
    progress: Progress = silent,
) -> None:
    """Train every weight of a sentence encoder on a task, and save it as a folder like the base.

    AdamW with a linear warm-up and decay, no dropout.

    Args:
        base: the encoder's folder.
        out: the folder to write.
        names: the classes, in plain words; the base's embeddings of them are the head.
        part: texts with their classes.
        steps: training steps of 32 texts.
        max_length: tokens that texts are cut to.
        seed: decides the order of the texts.
        progress: called at each step.
    """
    model = open_model(base)
    head = embed(model, names, max_length).clone()
    optimiser = torch.optim.AdamW(model.module.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _pace(step, steps))
    for step, (texts, labels) in enumerate(_draw(part, steps, seed), 1):
        logits = SHARPNESS * _embed(model, texts, max_length) @ head.T
        loss = functional.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        detail = {"loss": float(loss.detach())}
        progress(Event(stage="fine-tune", done=step, total=steps, unit="steps", detail=detail))
    _save(model, base, out)


def _embed(model: LoadedModel, texts: Sequence[str], max_length: int) -> Tensor:
    return outputs(model, tokenize(model, texts, max_length=max_length))[EMBEDDING]


def _draw(part: Texts, steps: int, seed: int) -> Iterator[tuple[list[str], Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(part.labels)
    for _ in range(steps):
        chosen = torch.randint(len(part), (BATCH,), generator=generator)
        yield [part.texts[index] for index in chosen.tolist()], labels[chosen]


def _pace(step: int, steps: int) -> float:
    warm = max(1, round(_WARM_UP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


def _save(model: LoadedModel, base: Path, out: Path) -> None:
    """Copy the base's folder with the trained tensors in place of its own."""
    shutil.copytree(base, out)
    source, state = Checkpoint.open(base), model.module.state_dict()
    tensors = {
        name: state[model.names[name]].to(tensor(source, name).dtype).contiguous()
        if name in model.names
        else tensor(source, name)
        for name in source.names
    }
    save_file(tensors, out / source.shards[0].path.name, {"format": "pt"})
