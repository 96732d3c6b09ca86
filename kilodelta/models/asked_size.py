"""Compare the size of the model that a `config.json` asks for with the weights that are given.

A configuration of a few bytes may ask for a million layers, which take minutes to build, or for
matrices of gigabytes, which transformers fills where the weights lack them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError
from kilodelta.files import plain, untrusted
from kilodelta.files.checkpoint import Checkpoint

_COUNTS = ("layers", "blocks", "depth", "depths", "experts", "stages")
"""How keys of `config.json` end that say how many modules a model has."""
_LABELS = 1 << 20
"""Labels for which transformers makes names."""
FACTOR = 4
"""Modules or parameters that a configuration may ask for, over those that the weights have."""
LAYERS, _EXPERTS, _PARAMETERS = 1000, 1 << 15, 1 << 23
"""What it may ask for in any case; most classes hold all experts of a layer in one tensor."""


def check_modules(folder: Path, tensors: int) -> None:
    """Check how many layers and experts a folder's `config.json` asks for.

    Args:
        folder: with a `config.json`; one that is no JSON is transformers' to refuse.
        tensors: that the weights hold.

    Raises:
        CheckpointError: it asks for far more than there are tensors.
    """
    for layers, experts in asked_modules(folder) or ():
        most = max(FACTOR * tensors, LAYERS)
        if layers > most or layers * experts > max(most, _EXPERTS):
            raise _too_large(folder, f"{layers} layers of {experts} experts", f"{tensors} tensors")


def check_parameters(folder: Path, kind: Any, config: Any, checkpoint: Checkpoint) -> None:
    """Check how many parameters a class has, built on the meta device, which allocates none.

    Args:
        folder: named in the error.
        kind: a class of transformers, called with `config`.
        config: what the folder's `config.json` says.
        checkpoint: the weights.

    Raises:
        CheckpointError: it has far more than the checkpoint holds.
    """
    import torch

    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            asked = sum(p.numel() for p in kind(config).parameters())
    except Exception:  # a class that cannot be built so is transformers' to build or to refuse
        return
    stored = sum(math.prod(checkpoint.info(name).shape) for name in checkpoint.names)
    if asked > max(FACTOR * stored, _PARAMETERS):
        raise _too_large(folder, f"{asked} parameters", f"{stored}")


def _too_large(folder: Path, asked: str, stored: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: config.json asks for {asked}, and the weights hold {stored}",
        fix="give the config.json that belongs to these weights",
    )


def asked_modules(folder: Path) -> list[tuple[int, int]] | None:
    """Return about how many layers, and experts in each, a folder's `config.json` asks for.

    One pair for each configuration in it, for a model may have one for each tower; None where it
    cannot be read.
    """
    try:
        config = json.loads(plain.read_model_file(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        return None
    return [_counts(table) for table in untrusted.objects(config)]


def _counts(table: Mapping[str, Any]) -> tuple[int, int]:
    made = {"layers": 1, "experts": 1}
    for key, value in table.items():
        number = sum(n for n in value if type(n) is int) if isinstance(value, list) else value
        if type(number) is not int:
            continue
        if key == "num_labels" and number > _LABELS:
            return number, 1
        if key.lower().endswith(_COUNTS):
            kind = "experts" if key.lower().endswith("experts") else "layers"
            made[kind] = max(made[kind], number)
    return made["layers"], made["experts"]
