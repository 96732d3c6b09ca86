"""Checkpoints of the official NOLA code: a `.pt` of its GPT-2 variant, a PEFT-like folder of LLaMA.

Each adapted layer is two factors, `lora_A` and `lora_B`, with `weight`, `seed`, `coefficients`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.compress.adapters.peft.config import read_config
from kilodelta.compress.adapters.peft.folder import PICKLE, WEIGHTS
from kilodelta.errors import CheckpointError, InputError, KiloDeltaError, one_line, require
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.dtypes import DTYPES
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
    """What a checkpoint holds.

    Attributes:
        path: the file or folder.
        layers: the factors of every adapted layer.
        others: tensors that are no part of a factor, by their names in the model.
        alpha: what the update is multiplied by, over the rank, if the checkpoint says so.
        device: where its tensors lay when it was saved, if the checkpoint says so.
        fan_in_fan_out: whether weights are stored (in, out).
    """

    path: Path
    layers: Layers
    alpha: float | None
    device: str | None
    fan_in_fan_out: bool
    others: Mapping[str, RawTensor] = field(default_factory=dict)


def is_official_nola(path: Path) -> bool:
    """Return whether a path is for this module: a file, or a folder whose configuration says so."""
    return path.is_file() or bool(read_config(path).values.get("use_nola"))


def open_checkpoint(path: Path) -> NolaCheckpoint:
    """Read a checkpoint; pickles are read with `weights_only`, which runs nothing.

    Raises:
        CheckpointError: it cannot be read, or a factor is incomplete.
        InputError: it is of another kind.
    """
    config: dict[str, Any] = {}
    if not path.is_file():
        settings = read_config(path)
        config = {
            "alpha": settings.option("lora_alpha", (int, float, type(None))),
            "flag": settings.option("fan_in_fan_out", (bool, type(None))),
        }
    tensors, device = _tensors(_file(path))
    layers, others = _layers(path, tensors)
    alpha = config.get("alpha")
    return NolaCheckpoint(
        path=path,
        layers=layers,
        others=others,
        alpha=None if alpha is None else float(alpha),
        device=device,
        fan_in_fan_out=bool(config.get("flag")),
    )


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    return path / WEIGHTS if (path / WEIGHTS).exists() else path / PICKLE


def _tensors(path: Path) -> tuple[dict[str, RawTensor], str | None]:
    """Return (tensors by key, where they lay)."""
    if path.suffix == ".safetensors":
        checkpoint = Checkpoint.open(path)
        return {name: checkpoint.raw(name) for name in checkpoint.names}, None
    return _unpickled(path)


def _unpickled(path: Path) -> tuple[dict[str, RawTensor], str | None]:
    torch: Any = require("torch", extra="torch", why="read a .pt or .bin checkpoint")
    places: set[str] = set()

    def here(storage: Any, place: object) -> Any:
        if not isinstance(place, str):
            raise ValueError(f"a tensor's device is a {type(place).__name__}, not a text")
        places.add(place)
        return storage

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of the protocol that a pickle is written in
            loaded = torch.load(path, map_location=here, weights_only=True)
    except Exception as problem:  # torch has no class for what may be wrong with a pickle
        why = "it is damaged, or no checkpoint of torch"
        if type(problem).__name__ == "UnpicklingError":  # whose text advises to run the code in it
            why = "it holds other Python objects than tensors, or is damaged"
        elif isinstance(problem, ValueError):
            why = one_line(problem)[:200]
        raise CheckpointError(
            f"{path} cannot be read as weights: {why}",
            fix="give the checkpoint as the official code saved it, or as .safetensors",
        ) from None
    state = loaded.get("model_state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            f"{path} holds no tensors by name, but a {type(state).__name__}",
            fix="give the checkpoint as the official code saved it: its model_state_dict is a"
            " dictionary of tensors",
        )
    tensors = {k: _raw(path, k, v) for k, v in state.items() if isinstance(v, torch.Tensor)}
    return tensors, ", ".join(sorted(places)) or None


def _raw(path: Path, key: str, value: Any) -> RawTensor:
    """Return a torch tensor's bytes.

    Raises:
        CheckpointError: it is sparse, quantised, complex or without data.
    """
    try:
        if str(value.layout) != "torch.strided" or value.is_quantized:
            raise CheckpointError(f"it is {value.layout}", fix="")
        return RawTensor.of(value)
    except (KiloDeltaError, RuntimeError, NotImplementedError) as problem:
        raise CheckpointError(
            f"{path}: tensor {key:.200} holds no plain numbers: {one_line(problem)[:200]}",
            fix="give the checkpoint as the official code saved it",
        ) from None


def _layers(path: Path, tensors: Mapping[str, RawTensor]) -> tuple[Layers, dict[str, RawTensor]]:
    found: dict[str, dict[str, dict[str, RawTensor]]] = {}
    others: dict[str, RawTensor] = {}
    for key in in_name_order(tensors):
        plain = without_front(key)
        match = _KEY.match(plain)
        if match is None or match["what"] not in _PARTS:
            others[plain] = tensors[key]
            continue
        parts = found.setdefault(match["layer"], {"A": {}, "B": {}})[match["factor"]]
        if match["what"] in parts:
            raise InputError(
                f"{path} holds {plain} more than once, under other fronts",
                fix="the file is mixed from two checkpoints: save it again",
            )
        parts[match["what"]] = tensors[key]
    if not found and any(key.endswith(_VIT) for key in tensors):
        raise InputError(
            f"{path} is of the official ViT variant, which keeps neither its head's bias nor the "
            "device that its bases were drawn on",
            fix="save the merged model from that code, and run kilodelta compress on it",
        )
    if not found:
        raise InputError(
            f"{path} holds no lora_A.coefficients: it is no checkpoint of the official NOLA code",
            fix="give a .pt of its GPT-2 variant, or the adapter folder of its LLaMA variant; for"
            " adapters of PEFT give the folder",
        )
    layers = {
        name: {side: _factor(path, f"{name}.lora_{side}", parts) for side, parts in layer.items()}
        for name, layer in found.items()
    }
    return layers, others


def without_front(key: str) -> str:
    """Return a key as the model without wrappers has it."""
    for front in _FRONTS:
        key = key.removeprefix(front)
    return key


def _factor(path: Path, name: str, parts: Mapping[str, RawTensor]) -> Factor:
    arrays = {}
    for part, kind, dimensions in zip(_PARTS, "fif", (2, 1, 1), strict=True):
        if part not in parts:
            raise CheckpointError(f"{path} has no {name}.{part}", fix="save the checkpoint again")
        raw = parts[part]
        array = arrays[part] = raw.values()
        dtype = DTYPES[raw.dtype].long or raw.dtype
        if array.dtype.kind != kind or array.ndim != dimensions or not array.size:
            raise CheckpointError(
                f"{path}: {name}.{part} is {dtype} {raw.shape}",
                fix="the official code keeps weight and coefficients in float32, seed in int64",
            )
        if kind == "f" and (array.dtype != np.float32 or not np.isfinite(array).all()):
            raise InputError(
                f"{path}: {name}.{part} is {dtype}, or not finite",
                fix="bases follow the coefficients' type: only float32 ones can be drawn again",
            )
    return Factor(
        start=arrays["weight"],
        seed=int(arrays["seed"][0]),
        coefficients=arrays["coefficients"],
    )
