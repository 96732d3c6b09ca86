"""Golden values, computed on a build machine: float64 outputs, and what each precision may lose.

The limits are those of `kilodelta.verify.parity.gate`: a multiple of what plain torch loses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kilodelta.device.golden.golden import Golden
from kilodelta.errors import InputError, KiloDeltaError
from kilodelta.models import Batch, LoadedModel, example, outputs, read_inputs
from kilodelta.verify.parity.cases import live
from kilodelta.verify.parity.gate import Limit, limit
from kilodelta.verify.parity.metrics import Metrics, compare
from kilodelta.verify.runners.runner import Arrays
from kilodelta.verify.runners.torch_runner import TorchRunner

ROWS, TOKENS = 4, 16
"""Of golden inputs that are made up."""


def golden_inputs(loaded: LoadedModel, spec: str | None, rows: int) -> Batch:
    """The first rows of given inputs; without any, made-up ones where the model's kind is known.

    Raises:
        InputError: they cannot be read, or nothing is known about the model's inputs.
    """
    if spec is not None:
        return read_inputs(spec, loaded, limit=rows, batch_size=rows)[0]
    shown = example(loaded, rows=ROWS, tokens=TOKENS)
    chance = torch.Generator().manual_seed(0)
    return {name: _filled(loaded, name, tensor, chance) for name, tensor in shown.items()}


def _filled(
    loaded: LoadedModel, name: str, tensor: torch.Tensor, chance: torch.Generator
) -> torch.Tensor:
    """Random tokens, random pixels; masks and the like as they are."""
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, generator=chance)
    words = getattr(loaded.module, "get_input_embeddings", None)
    if name != "input_ids" or words is None:
        return tensor
    return torch.randint(words().num_embeddings, tensor.shape, generator=chance)


def exact(loaded: LoadedModel, batch: Batch) -> Golden:
    """A model's outputs on a batch, computed in float64."""
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    with torch.inference_mode():
        names = list(outputs(loaded, batch))
    found = TorchRunner(loaded.view(), names, precision="float64", device="cpu").run(arrays)
    return Golden(
        inputs=arrays,
        outputs={name: array.astype(np.float32) for name, array in found.items()},
    )


def limits(loaded: LoadedModel, known: Golden, dtype: str) -> dict[str, Limit]:
    """By output, how far an artefact in `dtype` may be from the golden values."""
    runner = TorchRunner(loaded.view(), list(known.outputs), precision=dtype, device="cpu")
    errors = distances(runner.run(known.inputs), known)
    return {name: limit([error], dtype) for name, error in errors.items()}


def distances(found: Arrays, known: Golden) -> dict[str, Metrics]:
    """By output, the distance from the golden values, padding aside."""
    return {
        name: compare(live(found[name], known.inputs), live(array, known.inputs))
        for name, array in known.outputs.items()
    }


def telling_limits(
    merged: LoadedModel, base: LoadedModel, known: Golden, dtypes: Sequence[str]
) -> Mapping[str, Mapping[str, Limit]]:
    """Limits by precision, of those in which the base would be outside them.

    Raises:
        InputError: not even in float32 do the inputs tell the fine-tune from its base.
    """
    names = list(known.outputs)
    runner = TorchRunner(base.view(), names, precision="float64", device="cpu")
    away = distances(runner.run(known.inputs), known)
    found = {}
    for dtype in dtypes:
        try:
            allowed = limits(merged, known, dtype)
        except KiloDeltaError:  # torch cannot compute in it here: no statement
            continue
        if any(away[name].relative_l2 > 2 * allowed[name].relative_l2 for name in names):
            found[dtype] = allowed
    if "float32" not in found:
        raise InputError(
            "on these inputs the fine-tune and its base give the same outputs",
            fix="give inputs of the task that the fine-tune was made for",
        )
    return found
