"""Adapters of HF PEFT on pico models, with random coefficients, saved and merged by PEFT itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

AUTO = {
    "bert": AutoModel,
    "bert_classifier": AutoModelForSequenceClassification,
    "gpt2": AutoModelForCausalLM,
    "llama": AutoModelForCausalLM,
}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence PEFT's and transformers' warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def wrap(base: Path, kind: str, config: Any, *, seed: int = 3) -> Any:
    """Return a pico model with an adapter whose every trained tensor is random."""
    return adapted(AUTO[kind].from_pretrained(base), config, seed=seed)


def adapted(model: Any, config: Any, *, seed: int = 3, size: float = 0.1) -> Any:
    """Put an adapter around a model; its every trained tensor is random."""
    from peft import get_peft_model

    with quiet():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return wrapped


def save(model: Any, folder: Path) -> Path:
    """Save an adapter by PEFT's own `save_pretrained`."""
    with quiet():
        model.save_pretrained(folder)
    return folder


def updates(model: Any) -> dict[str, torch.Tensor]:
    """Return PEFT's `get_delta_weight` of every adapted module, by its path in the model."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def merged(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of PEFT's `merge_and_unload`, as its model saves them."""
    with quiet():
        model.merge_and_unload().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's folder."""
    return load_file(folder / WEIGHTS)


def edit(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None, **settings: Any
) -> Path:
    """Change an adapter's tensors by a function of the dictionary, and its configuration.

    A setting that is given as `...` is removed.
    """
    if change is not None:
        found = tensors(folder)
        change(found)
        save_file({key: value.contiguous() for key, value in found.items()}, folder / WEIGHTS)
    if settings:
        table = {**json.loads((folder / CONFIG).read_text()), **settings}
        kept = {key: value for key, value in table.items() if value is not ...}
        (folder / CONFIG).write_text(json.dumps(kept))
    return folder


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    """Give an adapter's tensors other keys."""

    def change(found: dict[str, torch.Tensor]) -> None:
        items = [(rename(key), value) for key, value in found.items()]
        found.clear()
        found.update(items)

    return edit(folder, change)
