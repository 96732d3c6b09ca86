"""Adapters of HF PEFT on pico models, with random coefficients, saved by PEFT itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

AUTO = {
    "bert": AutoModel,
    "bert_classifier": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's and transformers' warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def wrap(base: Path, kind: str, config: Any, *, seed: int = 3) -> Any:
    """A pico model with an adapter whose every trained tensor is random."""
    from peft import get_peft_model

    with quiet():
        torch.manual_seed(seed)
        model = get_peft_model(AUTO[kind].from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save(model: Any, folder: Path) -> Path:
    """By PEFT's own `save_pretrained`."""
    with quiet():
        model.save_pretrained(folder)
    return folder


def updates(model: Any) -> dict[str, torch.Tensor]:
    """PEFT's `get_delta_weight` of every adapted module, by its path in the model."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def merged(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of PEFT's `merge_and_unload`, as its model saves them."""
    with quiet():
        model.merge_and_unload().save_pretrained(folder)
    return load_file(folder / "model.safetensors")
