"""The pico classifier with a delta on its encoder, and rows to train it on; processes import it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kilodelta.compress.training import train
from kilodelta.format.methods import Method, Nola, RandLora, UniLora, Vera
from tests.support import pico

EVERY: list[Method] = [
    Nola(rank=2, bases=40),
    RandLora(rank=4),
    UniLora(rank=2, bases=300),
    Vera(rank=4),
]
LAYERS = "*encoder*.weight"


def classifier(folder: Path, method: Method | None = None, *, seed: int = 0) -> Any:
    """The pico classifier without dropout, with a delta on its encoder."""
    from transformers import AutoModelForSequenceClassification

    base = folder / "base"
    if not base.exists():
        pico.bert_classifier(base)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    if method is None:
        return model
    return train.attach(
        model, method, LAYERS, exclude=["*LayerNorm*"], extras=["classifier.*"], seed=seed
    )


def rows(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(4, 40, (8,), generator=generator),
            "attention_mask": torch.ones(8, dtype=torch.long),
            "labels": torch.tensor(index % pico.LABELS),
        }
        for index in range(count)
    ]


def batch(count: int = 8) -> dict[str, Tensor]:
    found = rows(count)
    return {name: torch.stack([row[name] for row in found]) for name in found[0]}
