"""Golden values, computed on a build machine: float64 outputs, and what each precision may lose.

The limits are those of `kilodelta.verify.parity.gate`: a multiple of what plain torch loses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kilodelta.device.folder.bundle import CEILINGS
from kilodelta.device.golden.golden import Golden
from kilodelta.errors import InputError, KiloDeltaError
from kilodelta.models import Batch, LoadedModel, example, outputs, read_inputs
from kilodelta.verify.parity.cases import live
from kilodelta.verify.parity.gate import MULTIPLE, Limit, limit, widened
from kilodelta.verify.parity.metrics import NO_REFERENCE, Metrics, are_all_nan, compare
from kilodelta.verify.runners.rounding_noise import noisy_runs
from kilodelta.verify.runners.runner import Arrays
from kilodelta.verify.runners.torch_runner import TorchRunner

ROWS, TOKENS = 4, 16
"""Of golden inputs that are made up."""


def golden_inputs(loaded: LoadedModel, spec: str | None, rows: int) -> Batch:
    """Read the first rows of given inputs; without any, make some up for a known kind of model.

    Args:
        loaded: the model.
        spec: as `kilodelta.models.read_inputs` takes it, or None.
        rows: rows to read.

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
    """Compute a model's outputs on a batch in float64, and return both, outputs in float32.

    Raises:
        InputError: all of them are NaN.
    """
    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    with torch.inference_mode():
        names = list(outputs(loaded, batch))
    runner = TorchRunner(loaded.view(), names, precision="float64", device="cpu")
    made = runner.run(arrays)
    if are_all_nan([made]):
        raise InputError(NO_REFERENCE[0], fix=NO_REFERENCE[1])
    narrow = {name: array.astype(np.float32) for name, array in made.items()}
    return Golden(inputs=arrays, outputs=narrow)


def limits(loaded: LoadedModel, known: Golden, dtype: str) -> dict[str, Limit]:
    """Return by output how far an artefact in `dtype` may be from the golden values.

    As in a verification, the largest error counts of torch as it is, of torch that adds the terms
    of long sums one after another, as runtimes do, and of rounding noise in the golden values.
    """
    names = list(known.outputs)
    errors = [
        distances(
            TorchRunner(loaded.view(), names, precision=dtype, device="cpu", in_order=in_order).run(
                known.inputs
            ),
            known,
        )
        for in_order in (False, True)
    ]
    runner = TorchRunner(loaded.view(), names, precision="float64", device="cpu")
    noisy = [distances(run, known) for run in noisy_runs(runner, known.inputs, dtype)]
    return {
        name: widened(
            limit([each[name] for each in errors], dtype),
            [each[name] for each in noisy if known.outputs[name].dtype.kind == "f"],
        )
        for name in names
    }


def distances(outputs: Arrays, known: Golden) -> dict[str, Metrics]:
    """Return by output the distance from the golden values, without padding."""
    return {
        name: compare(live(outputs[name], known.inputs), live(array, known.inputs))
        for name, array in known.outputs.items()
    }


def telling_limits(
    merged: LoadedModel, base: LoadedModel, known: Golden, dtypes: Sequence[str]
) -> Mapping[str, Mapping[str, Limit]]:
    """Return limits by precision and output, for the precisions that tell fine-tune from base.

    A precision tells if the base would be outside its limits. One whose limits are above what
    devices accept (`CEILINGS`) is left out as well: torch itself is lost in it.

    Args:
        merged: the fine-tune.
        base: its base.
        known: golden values of the fine-tune.
        dtypes: the precisions to try.

    Raises:
        InputError: not even in float32 do the inputs tell the fine-tune from its base, or is torch
            as exact as a device must be.
    """
    names = list(known.outputs)
    runner = TorchRunner(base.view(), names, precision="float64", device="cpu")
    away = distances(runner.run(known.inputs), known)
    telling = {}
    for dtype in dtypes:
        try:
            allowed = limits(merged, known, dtype)
        except KiloDeltaError:  # torch cannot compute in it here: no statement
            continue
        loosest = max(max(most.relative_l2, most.relative_max) for most in allowed.values())
        tells = any(away[name].relative_l2 > 2 * allowed[name].relative_l2 for name in names)
        if loosest > CEILINGS[dtype] and dtype == "float32":
            raise InputError(
                f"on these inputs torch itself is off by {loosest / MULTIPLE:.2g} in float32, so "
                "no device can be held to anything",
                fix="give other inputs of the task, or release it without --inputs",
            )
        if tells and loosest <= CEILINGS[dtype]:
            telling[dtype] = allowed
    if "float32" not in telling:
        raise InputError(
            "on these inputs the fine-tune and its base give the same outputs",
            fix="give inputs of the task that the fine-tune was made for",
        )
    return telling
