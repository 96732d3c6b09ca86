"""Train a delta of a small vision transformer: a reader of digits learns to read them mirrored.

    pip install '.[hf]' scikit-learn  # in a clone
    python examples/train_vision.py [FOLDER]

The images are scikit-learn's 8 x 8 digits, which come with the package.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import kilodelta
from kilodelta import train
from kilodelta.models import open_model

TRAINED = 1400


def digits(*, mirrored: bool) -> tuple[Tensor, Tensor]:
    """Load images, float32 (1797, 1, 8, 8) in 0..1, and their classes."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return images.flip(-1) if mirrored else images, torch.tensor(bunch.target)


def fit(model: Any, images: Tensor, labels: Tensor, *, steps: int, rate: float) -> None:
    """Run the usual loop, with a rate that falls to zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        chosen = torch.randint(TRAINED, (64,))
        loss = model(pixel_values=images[chosen], labels=labels[chosen]).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: Any, images: Tensor, labels: Tensor) -> float:
    """Measure on the images that no training saw."""
    predicted = model(pixel_values=images[TRAINED:]).logits.argmax(-1)
    return float((predicted == labels[TRAINED:]).float().mean())


def main(folder: Path) -> None:
    """Train a base, train a delta of it, and merge."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    straight, mirrored = digits(mirrored=False), digits(mirrored=True)
    fit(model, *straight, steps=500, rate=2e-3)
    model.save_pretrained(folder / "base")
    before = accuracy(model, *straight), accuracy(model, *mirrored)
    print("base: {:.1%} straight, {:.1%} mirrored".format(*before))

    loaded = open_model(folder / "base")  # knows the files' names of the tensors
    model = train.attach(
        loaded.module,
        train.UniLora(rank=4, bases=3000),
        "*encoder*.weight",
        exclude=["*norm*"],
        names=loaded.names,
    )
    fit(model, *mirrored, steps=400, rate=1.5e-2)
    train.quantise(model, bits=4)  # the last steps run with the numbers that the file will hold
    fit(model, *mirrored, steps=150, rate=3e-3)
    size = train.save(model, folder / "mirrored.kd", base=folder / "base")
    kilodelta.merge(folder / "base", folder / "mirrored.kd", folder / "merged")
    merged = open_model(folder / "merged").module
    whole = (folder / "base" / "model.safetensors").stat().st_size
    print(
        f"delta: {size} bytes of {whole}, {accuracy(merged, *mirrored):.1%} mirrored after merging"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
