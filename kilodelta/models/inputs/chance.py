"""Notice models that draw random numbers while they compute, which nothing can be proved of.

ViT-MAE masks patches at random unless it is given its `noise`; a diffusion model may draw a step.
Distilling such a model learns from chance, and no two of its results agree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kilodelta.errors import InputError
from kilodelta.models.loaded import LoadedModel, outputs


def repeatable_outputs(loaded: LoadedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute what `outputs` does, and see that it is the same each time.

    Only a model that has moved torch's random state computes twice.

    Args:
        loaded: in eval mode, on the CPU.
        batch: tensors by input name.

    Raises:
        InputError: the same inputs give other outputs; names one, and the inputs that were not
            given.
    """
    before = torch.get_rng_state()
    first = outputs(loaded, batch)
    if torch.equal(torch.get_rng_state(), before):
        return first
    second = outputs(loaded, batch)
    for name, tensor in first.items():
        if not _are_equal(tensor, second[name]):
            raise _drawn(name, loaded, batch)
    return first


def _are_equal(a: Tensor, b: Tensor) -> bool:
    """Return whether two results are one: equal in shape and values, NaN at the same places."""
    if a.shape != b.shape:
        return False
    same = (a == b) | ((a != a) & (b != b))
    return bool(same.all())


def _drawn(output: str, loaded: LoadedModel, batch: Mapping[str, Tensor]) -> InputError:
    others = [name for name in loaded.accepts if name not in batch]
    ask = f"give what it draws as an input, if it is one of {', '.join(others)}" if others else ""
    return InputError(
        f"{type(loaded.module).__name__} draws random numbers while it computes: {output} differs "
        "each time for the same inputs",
        fix=", or ".join(filter(None, (ask, "wrap it by --model in a module that draws none"))),
    )
