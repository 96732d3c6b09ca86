"""DINOv2 ViT-S/14 on a few images of each class of CIFAR-10: RandLoRA's few-shot protocol.

The images are scaled to 70 pixels, 5 x 5 patches. The head costs no bytes: it is a linear layer of
the base's folder, which puts an image into the class whose mean lies nearest to it, means being
those of the base's own features of the shots. It is frozen, so the whole change is in the backbone.

Source: Albert et al., RandLoRA, https://arxiv.org/abs/2502.00987, whose DINOv2 is larger and whose
few-shot sets are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PIXELS = 70
BATCH = 16
EPOCHS = {16: 5, 4: 12, 1: 24}
UNLABELLED = 500
"""Images that `compress` is given: spread over the training set, without labels."""
TESTS = 500


class Vision:
    """A number of shots and a seed, which chooses them."""

    budget = 25_000
    rate, lora_rate = 5e-5, 2e-3
    options: Mapping[str, Any] = MappingProxyType(
        {"steps": 300, "batch": 16, "held_out": 50, "rate": 3e-3}
    )

    def __init__(self, *, bases: Path, data: Path, place: Path, seed: int, shots: int) -> None:
        self.backbone, self.place, self.seed = bases / "dinov2", place, seed
        self.file = data / "cifar10_subset.npz"
        count = 10 * shots
        self.steps = EPOCHS[shots] * max(1, count // BATCH)
        with np.load(self.file) as held:
            labels = held["y_train"].astype(np.int64)
            rng = np.random.default_rng(seed)
            rows = [rng.permutation((labels == n).nonzero()[0])[:shots] for n in range(10)]
            self.classes = [str(name) for name in held["classes"]]
            self.shots, self.labels = held["x_train"], torch.tensor(labels)
            self.chosen = np.concatenate(rows)
            every = len(held["x_test"]) // TESTS  # the file is sorted by class
            self.tests = held["x_test"][::every]
            self.truth = torch.tensor(held["y_test"][::every].astype(np.int64))

    def base(self) -> Path:
        """The backbone's folder with the head in it, a folder of photos, and ten as an array."""
        out = self.place / "base"
        if not out.exists():
            _write_photos(self.shots[:: len(self.shots) // UNLABELLED], self.inputs())
            np.savez(self.place / "photos.npz", pixel_values=self._pixels(self.tests[::50]).numpy())
            self._write_base(out)
        return out

    def inputs(self) -> Path:
        return self.place / "photos"

    def open(self, folder: Path) -> nn.Module:
        from transformers import Dinov2ForImageClassification

        model: nn.Module = Dinov2ForImageClassification.from_pretrained(folder)
        return model.eval()

    def trainable(self, name: str) -> bool:
        return not name.startswith("classifier.") and "mask_token" not in name

    def layers(self, model: nn.Module) -> list[str]:
        linear = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
        return [name for name, _ in linear if name != "classifier"]

    def losses(self, model: nn.Module) -> Iterator[Tensor]:
        """Cross entropy on the shots, mirrored and shifted at random."""
        images, truth = self._pixels(self.shots[self.chosen]), self.labels[self.chosen]
        while True:
            for rows in torch.split(torch.randperm(len(truth)), BATCH):
                if len(rows) == min(BATCH, len(truth)):
                    logits = model(pixel_values=_moved(images[rows])).logits
                    yield nn.functional.cross_entropy(logits, truth[rows])

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Accuracy on the test images, in per cent."""
        logits = [
            model(pixel_values=part).logits for part in torch.split(self._pixels(self.tests), 50)
        ]
        right = torch.cat(logits).argmax(-1) == self.truth
        return {"score": 100 * float(right.float().mean())}

    def _pixels(self, images: Any) -> Tensor:
        from transformers import AutoImageProcessor

        size = {"height": PIXELS, "width": PIXELS}
        processor = AutoImageProcessor.from_pretrained(
            self.backbone, size={"shortest_edge": PIXELS}, crop_size=size
        )
        pixels: Tensor = processor(images=list(images), return_tensors="pt").pixel_values
        return pixels

    @torch.no_grad()
    def _write_base(self, out: Path) -> None:
        from transformers import AutoImageProcessor, Dinov2ForImageClassification

        names = dict(enumerate(self.classes))
        model = Dinov2ForImageClassification.from_pretrained(
            self.backbone, id2label=names, label2id={name: n for n, name in names.items()}
        ).eval()
        model.dinov2.embeddings.mask_token.zero_()
        heard: list[Tensor] = []
        hook = model.classifier.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
        for part in torch.split(self._pixels(self.shots[self.chosen]), 50):
            model(pixel_values=part)
        hook.remove()
        features, truth = torch.cat(heard), self.labels[self.chosen]
        means = torch.stack([features[truth == n].mean(0) for n in range(10)])
        # The nearest mean as a linear layer: -|x - m|^2 = 2 x m - |m|^2 - |x|^2, and the last is
        # alike for all classes. The scale brings the mean distance between two means to 10.
        scale = 10 * 90 / torch.cdist(means, means).square().sum()
        model.classifier.weight.copy_(2 * scale * means)
        model.classifier.bias.copy_(-scale * means.square().sum(1))
        model.save_pretrained(out)
        size = {"height": PIXELS, "width": PIXELS}
        AutoImageProcessor.from_pretrained(
            self.backbone, size={"shortest_edge": PIXELS}, crop_size=size
        ).save_pretrained(out)


def _moved(images: Tensor) -> Tensor:
    """Each image mirrored or not, and all shifted by at most an eighth."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    edge = PIXELS // 8
    padded = nn.functional.pad(images, (edge,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * edge + 1, (2,)).tolist()
    return padded[:, :, top : top + PIXELS, left : left + PIXELS]


def _write_photos(images: Any, out: Path) -> None:
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images):
        Image.fromarray(image).save(out / f"{n:05}.png")
