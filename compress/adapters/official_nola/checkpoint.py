"""Checkpoints of the official NOLA code: a `.pt` of its GPT-2 variant, a PEFT-like folder of LLaMA.

Each adapted layer is two factors, `lora_A` and `lora_B`, with `weight`, `seed`, `coefficients`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.compress.adapters.peft.folder import PICKLE, WEIGHTS, read_config
from kilodelta.errors import CheckpointError, InputError, require
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.tensor import RawTensor
from kilodelta.format.quantise import Floats

_KEY = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.(?P<what>\w+)\Z")
_FRONTS = ("module.", "base_model.model.")
_VIT = (".nola_alpha", ".nola_beta")
_PARTS = ("weight", "seed", "coefficients")


@dataclass(frozen=True, kw_only=True)
class Factor:
    """start + sum_i coefficients_i U_i / sqrt k, the U drawn from the seed."""

    start: Floats
    seed: int
    coefficients: Floats


Layers = Mapping[str, Mapping[str, Factor]]
"""Layer path to its factors, `A` (r, in) and `B` (out, r)."""


@dataclass(frozen=True, kw_only=True)
class NolaCheckpoint:
    """What a checkpoint holds, and where its tensors lay when it was saved, if it says so."""

    path: Path
    layers: Layers
    alpha: float | None
    device: str | None
    fan_in_fan_out: bool


def is_official_nola(path: Path) -> bool:
    """Whether a path is for this module: a file, or a folder whose configuration says so."""
    return path.is_file() or bool(read_config(path).get("use_nola"))


def open_checkpoint(path: Path) -> NolaCheckpoint:
    """Read a checkpoint; pickles are read with `weights_only`, which runs nothing.

    Raises:
        CheckpointError: it cannot be read, or a factor is incomplete.
        InputError: it is of another kind.
    """
    config: dict[str, Any] = {} if path.is_file() else read_config(path)
    tensors, device = _tensors(_file(path))
    alpha = config.get("lora_alpha")
    return NolaCheckpoint(
        path=path,
        layers=_layers(path, tensors),
        alpha=float(alpha) if isinstance(alpha, (int, float)) else None,
        device=device,
        fan_in_fan_out=bool(config.get("fan_in_fan_out", False)),
    )


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    return path / WEIGHTS if (path / WEIGHTS).exists() else path / PICKLE


def _tensors(path: Path) -> tuple[dict[str, Floats], str | None]:
    """(arrays by key, where they lay)."""
    if path.suffix == ".safetensors":
        checkpoint = Checkpoint.open(path)
        return {name: _array(checkpoint, name) for name in checkpoint.names}, None
    return _unpickled(path)


def _array(checkpoint: Checkpoint, name: str) -> Floats:
    return checkpoint.raw(name).values().copy()


def _unpickled(path: Path) -> tuple[dict[str, Floats], str | None]:
    torch: Any = require("torch", extra="torch", why="read a .pt or .bin checkpoint")
    places: set[str] = set()

    def here(storage: Any, place: str) -> Any:
        places.add(place)
        return storage

    try:
        found = torch.load(path, map_location=here, weights_only=True)
    except Exception as problem:
        raise CheckpointError(
            f"{path} cannot be read as weights: {str(problem).splitlines()[0]:.200}",
            fix="give the checkpoint as the official code saved it, or as .safetensors",
        ) from None
    state = found.get("model_state_dict", found) if isinstance(found, dict) else {}
    arrays = {k: _from_torch(v) for k, v in state.items() if isinstance(v, torch.Tensor)}
    return arrays, ", ".join(sorted(places)) or None


def _from_torch(value: Any) -> Floats:
    return RawTensor.of(value).values()


def _layers(path: Path, tensors: Mapping[str, Floats]) -> Layers:
    found: dict[str, dict[str, dict[str, Floats]]] = {}
    for key in in_name_order(tensors):
        match = _KEY.match(without_front(key))
        if match and match["what"] in _PARTS:
            layer = found.setdefault(match["layer"], {"A": {}, "B": {}})
            layer[match["factor"]][match["what"]] = tensors[key]
    if not found and any(key.endswith(_VIT) for key in tensors):
        raise InputError(
            f"{path} is of the official ViT variant, which keeps neither its head's bias nor the "
            "device that its bases were drawn on",
            fix="save the merged model from that code, and run kilodelta compress on it",
        )
    if not found:
        raise InputError(
            f"{path} holds no lora_A.coefficients: it is no checkpoint of the official NOLA code",
            fix="give a .pt of its GPT-2 variant, or the adapter folder of its LLaMA variant",
        )
    return {
        name: {side: _factor(path, f"{name}.lora_{side}", parts) for side, parts in layer.items()}
        for name, layer in found.items()
    }


def without_front(key: str) -> str:
    """A key as the model without wrappers has it."""
    for front in _FRONTS:
        key = key.removeprefix(front)
    return key


def _factor(path: Path, name: str, parts: Mapping[str, Floats]) -> Factor:
    for part, kind, dimensions in zip(_PARTS, "fif", (2, 1, 1), strict=True):
        if part not in parts:
            raise CheckpointError(f"{path} has no {name}.{part}", fix="save the checkpoint again")
        array = parts[part]
        if array.dtype.kind != kind or array.ndim != dimensions or not array.size:
            raise CheckpointError(
                f"{path}: {name}.{part} is {array.dtype} {array.shape}",
                fix="the official code keeps weight and coefficients in float32, seed in int64",
            )
        if kind == "f" and (array.dtype != np.float32 or not np.isfinite(array).all()):
            raise InputError(
                f"{path}: {name}.{part} is {array.dtype}, or not finite",
                fix="bases follow the coefficients' type: only float32 ones can be drawn again",
            )
    return Factor(
        start=parts["weight"], seed=int(parts["seed"][0]), coefficients=parts["coefficients"]
    )
