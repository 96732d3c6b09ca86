"""A small module that puts out whatever a test asks for, from texts, images or sounds.

`make` and `batches` are named as `tests.support.many_outputs:make`; what they make is set in `SPEC`
and `BATCHES` before. Nothing that stands at padding reaches another position, so that a row gives
the same alone and in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH, CLASSES, WORDS = 8, 5, 20


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What goes in (`tokens`, `image`, `audio`), whether with a mask, and what comes out."""

    inputs: str
    mask: bool
    outputs: tuple[str, ...]
    nested: bool = False


SPEC = Spec(inputs="tokens", mask=False, outputs=("logits",))
BATCHES: list[dict[str, Tensor]] = []

OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "tokens": (
        "logits", "token_logits", "early_logits", "start_logits", "states", "score", "box",
        "pair_logits",
    ),
    "image": ("logits", "pixel_logits", "features", "score"),
    "audio": ("logits", "frame_logits", "score"),
}  # fmt: skip
"""By input: what the module can put out."""

MEANING: Mapping[str, tuple[str, int | None]] = {
    "logits": ("top-1", 1),
    "token_logits": ("top-1", 2),
    "early_logits": ("top-1", 1),
    "start_logits": ("span", 1),
    "pair_logits": ("yes-no", None),
    "pixel_logits": ("top-1", 1),
    "frame_logits": ("top-1", 2),
    "states": ("cosine", 2),
    "features": ("cosine", 1),
    "box": ("cosine", 1),
    "score": ("r2", None),
}
"""What each output's agreement counts, and along which axis."""


class Many(nn.Module):
    """Mixes its input along itself, and reads every output off the result."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        if spec.inputs == "tokens":
            self.first: nn.Module = nn.Embedding(WORDS, WIDTH)
        elif spec.inputs == "image":
            self.first = nn.Conv2d(3, WIDTH, 3, padding=1)
        else:
            self.first = nn.Conv1d(1, WIDTH, 4, stride=4)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.classes = nn.Linear(WIDTH, CLASSES)
        self.number = nn.Linear(WIDTH, 1)
        self.corners = nn.Linear(WIDTH, 4)

    def read(self, states: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """The outputs of states (rows, positions, width)."""
        counts = torch.ones(states.shape[:2]) if mask is None else mask.float()
        mean = (states * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
        states = torch.tanh(self.body(states + mean[:, None]))
        pooled = (states * counts[..., None]).sum(1) / counts.sum(1, keepdim=True)
        scores = self.classes(states)
        found: dict[str, Any] = {
            "logits": self.classes(pooled),
            "score": self.number(pooled),
            "box": self.corners(pooled),
            "states": states,
            "token_logits": scores,
            "frame_logits": scores,
            "early_logits": scores.transpose(1, 2),
            "start_logits": self.number(states)[..., 0],
            "pair_logits": states @ states.transpose(1, 2),
        }
        return {name: found[name] for name in self.spec.outputs if name in found}

    def arrange(self, found: dict[str, Any]) -> Any:
        """Put all outputs but the first into a nested mapping, where that is asked for."""
        if not self.spec.nested or len(found) < 2:
            return found
        first, *rest = found
        return {first: found[first], "inner": {"deep": {name: found[name] for name in rest}}}


class Tokens(Many):
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.arrange(self.read(self.first(input_ids), attention_mask))


class Image(Many):
    def forward(self, image: Tensor) -> Any:
        area = self.first(image)
        found = self.read(area.flatten(2).transpose(1, 2), None)
        spread = torch.tanh(self.body(area.movedim(1, -1)))
        maps = {
            "features": spread.movedim(-1, 1),
            "pixel_logits": self.classes(spread).movedim(-1, 1),
        }
        found |= {name: maps[name] for name in self.spec.outputs if name in maps}
        return self.arrange(found)


class Audio(Many):
    def forward(self, sound: Tensor, attention_mask: Tensor | None = None) -> Any:
        kept = sound if attention_mask is None else sound * attention_mask
        frames = self.first(kept[:, None]).transpose(1, 2)
        counts = None if attention_mask is None else attention_mask[:, 3::4][:, : frames.shape[1]]
        return self.arrange(self.read(frames, counts))


def make() -> nn.Module:
    """The module of `SPEC`, with random weights."""
    kind = {"tokens": Tokens, "image": Image, "audio": Audio}[SPEC.inputs]
    torch.manual_seed(1)
    return kind(SPEC).eval()


def batches() -> list[dict[str, Tensor]]:
    """The batches of `BATCHES`."""
    return BATCHES


def draw_batches(spec: Spec, rows: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of random inputs; with a mask, texts and sounds have different lengths."""
    generator = torch.Generator().manual_seed(seed)
    if spec.inputs == "image":
        return [{"image": torch.randn(rows, 3, 6, 7, generator=generator)}]
    longest = 9 if spec.inputs == "tokens" else 32
    if spec.inputs == "tokens":
        name, values = "input_ids", torch.randint(0, WORDS, (rows, longest), generator=generator)
    else:
        name, values = "sound", torch.randn(rows, longest, generator=generator)
    if not spec.mask:
        return [{name: values}]
    step = 1 if spec.inputs == "tokens" else 4
    lengths = step * torch.randint(2, longest // step + 1, (rows,), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return [{name: values * mask, "attention_mask": mask}]


def save(module: nn.Module, path: Path) -> Path:
    """The module's tensors as a safetensors file."""
    from kilodelta.files import safetensors
    from kilodelta.files.tensor import RawTensor

    state = module.state_dict()
    safetensors.write(path, {name: RawTensor.of(values) for name, values in state.items()})
    return path


def save_pair(folder: Path) -> Path:
    """Write base, tuned model and inputs of a model of tokens, as files of a folder; return it."""
    module = make()
    save(module, folder / "base.safetensors")
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save(module, folder / "tuned.safetensors")
    ids = np.random.default_rng(0).integers(0, 20, (40, 6))
    np.savez(folder / "ids.npz", input_ids=ids)
    return folder


def agreement(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]], name: str) -> float:
    """What an output's agreement must be: by its meaning, over rows that were computed alone.

    Args:
        ours: outputs of each row, (1, ...), of the model that is judged.
        theirs: the same of the tuned model.
        name: the output, dotted where it is nested.
    """
    kind, axis = MEANING[name.rpartition(".")[2]]
    pairs = [(a[name].double().numpy(), b[name].double().numpy()) for a, b in zip(ours, theirs)]  # noqa: B905
    if kind == "r2":
        s, t = (np.concatenate([pair[i].reshape(-1) for pair in pairs]) for i in range(2))
        return float(1 - ((s - t) ** 2).sum() / ((t - t.mean()) ** 2).sum())
    found = []
    for s, t in pairs:
        if kind == "yes-no":
            found += ((s > 0) == (t > 0)).reshape(-1).tolist()
            continue
        assert axis is not None
        s, t = (np.moveaxis(v, axis, -1).reshape(-1, v.shape[axis]) for v in (s, t))
        if kind in ("top-1", "span"):
            found += (s.argmax(-1) == t.argmax(-1)).tolist()
        else:
            norms = np.linalg.norm(s, axis=-1) * np.linalg.norm(t, axis=-1)
            found += ((s * t).sum(-1) / norms).tolist()
    return float(np.mean(found))
