"""Compare a training step of NOLA with PEFT's LoRA of the same rank: time and memory.

The model has GPT-2 medium's shape and random weights; all four matrices of each block are adapted
by both. A step is forward, backward and Adam; on CUDA it runs under bfloat16 autocast.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.compress.training import train
from kilodelta.errors import require
from kilodelta.verify.gpu.measure import Measure, Threshold, peak, side_by_side
from kilodelta.verify.runners.runner import UnavailableError

RANK = 8
MATRICES = ("c_attn", "c_proj", "c_fc")
OURS, THEIRS = "NOLA", "PEFT LoRA"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A GPT-2's shape, NOLA's bases, and the tokens of a step as (texts, tokens)."""

    layers: int = 24
    width: int = 1024
    heads: int = 16
    vocabulary: int = 50257
    bases: int = 512
    tokens: tuple[int, int] = (8, 512)


SMALL = Shape(layers=1, width=32, heads=2, vocabulary=64, bases=16, tokens=(2, 8))


class TrainingStep:
    """A training step of an adapted model, to be called as often as needed."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        self._model, self._batch = model, dict(batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimiser = torch.optim.Adam(trained, lr=1e-3)

    def __call__(self) -> None:
        """Run forward, backward and Adam once."""
        device = next(iter(self._batch.values())).device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = self._model(**self._batch).last_hidden_state.float().square().mean()
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()


def training(device: torch.device, *, small: bool) -> Iterator[Measure]:
    """Measure the time of both in rotation, then the memory of each alone.

    Raises:
        UnavailableError: memory is counted on CUDA only.
        MissingPackageError: transformers or PEFT is not installed.
    """
    shape = SMALL if small else Shape()
    base = _gpt2(shape).to(device)
    batch = {"input_ids": torch.randint(shape.vocabulary, shape.tokens).to(device)}
    steps: Mapping[str, Callable[[], TrainingStep]] = {
        name: lambda adapt=adapt: TrainingStep(adapt(sharing(base), shape), batch)  # type: ignore[misc]
        for name, adapt in ADAPTED.items()
    }
    what = f"training step, GPT-2 of {shape.layers} x {shape.width}, NOLA r={RANK} k={shape.bases}"
    against = f"PEFT LoRA r={RANK}"
    seconds = side_by_side({name: make() for name, make in steps.items()}, device)
    yield Measure(
        what=f"{what}, time",
        against=against,
        ours=seconds[OURS],
        theirs=seconds[THEIRS],
        wanted=Threshold(sense="<=", bound=1.2),
    )
    if device.type != "cuda":
        raise UnavailableError("memory is counted on CUDA only", fix="measure on a GPU")
    nbytes = {name: peak(lambda make=make: _two(make), device) for name, make in steps.items()}  # type: ignore[misc]
    yield Measure(
        what=f"{what}, memory above the model",
        against=against,
        ours=nbytes[OURS],
        theirs=nbytes[THEIRS],
        unit="B",
        wanted=Threshold(sense="<=", bound=1),
    )


def _two(make: Callable[[], TrainingStep]) -> None:
    """Run two steps: from the second on Adam's moments are allocated."""
    step = make()
    step()
    step()


def _gpt2(shape: Shape) -> nn.Module:
    transformers = require("transformers", extra="hf", why="build a GPT-2 to train")
    require("peft", extra="peft", why="measure PEFT beside kilodelta")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=shape.vocabulary,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: nn.Module = transformers.GPT2Model(config).train()
    return model.requires_grad_(False)


def sharing(model: nn.Module) -> nn.Module:
    """Copy a model's modules and share its frozen weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def _nola(model: nn.Module, shape: Shape) -> nn.Module:
    method = train.Nola(rank=RANK, bases=shape.bases)
    return train.attach(model, method, [f"h.*.{name}.weight" for name in MATRICES])


def _lora(model: nn.Module, shape: Shape) -> nn.Module:
    library: Any = require("peft", extra="peft", why="measure PEFT beside kilodelta")
    config = library.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(MATRICES), fan_in_fan_out=True
    )
    wrapped: nn.Module = library.get_peft_model(model, config)
    return wrapped


ADAPTED: Mapping[str, Callable[[nn.Module, Shape], nn.Module]] = {OURS: _nola, THEIRS: _lora}
