"""Notice models that draw random numbers while they compute, which nothing can be proved of.

ViT-MAE masks patches at random unless it is given its `noise`, ViLT draws the order of patches, a
diffusion model may draw a step. Distilling such a model learns from chance, and no two of its
results agree.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kilodelta.errors import InputError
from kilodelta.models.loaded import LoadedModel, outputs

ROUNDING = 1e-3
"""Relative L2 difference of two runs from which it is no rounding: libraries may add in another
order where memory lies otherwise, although nothing was drawn."""


def repeatable_outputs(loaded: LoadedModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Compute what `outputs` does, twice, and see that it is the same each time.

    Where the state of a random generator has moved, the same means equal in every bit; else a
    model may still draw by a generator of its own, and the same means but for rounding.

    Args:
        loaded: in eval mode, on the CPU.
        batch: tensors by input name.

    Raises:
        InputError: the same inputs give other outputs; names one, what drew the numbers, and the
            inputs that were not given.
    """
    before = _states()
    first = outputs(loaded, batch)
    moved = [name for name, state in _states().items() if state != before[name]]
    draws = Draws()
    with draws:
        second = outputs(loaded, batch)
    for name, tensor in first.items():
        if not _are_same(tensor, second[name], exactly=bool(moved)):
            drawn = [*draws.operators, *(other for other in moved if other != "torch")]
            raise _drawn(name, drawn, loaded, batch)
    return first


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note the operators that draw random numbers, such as `multinomial`, each once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: dict[str, None] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; True, the default, would import dynamo, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **named)
        before = torch.get_rng_state()
        result = func(*args, **named)
        moved = not torch.equal(torch.get_rng_state(), before)  # dropout in eval mode draws nothing
        if moved or named.get("generator") is not None:
            self.operators[func.overloadpacket.__name__] = None
        return result


def _states() -> dict[str, object]:
    """Return the states of the generators that everybody shares, by the name of the package."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy.random": (kind, np.asarray(keys).tobytes(), rest),
        "random": random.getstate(),
    }


def _are_same(a: Tensor, b: Tensor, *, exactly: bool) -> bool:
    """Return whether two results are one; NaN at the same places is equal."""
    if a.shape != b.shape:
        return False
    same = (a == b) | ((a != a) & (b != b))
    if exactly or not a.is_floating_point() or bool(same.all()):
        return bool(same.all())
    change = torch.where(same, 0.0, (a - b).double())
    size = torch.where(a.isfinite(), a, 0.0).double().norm()
    return bool(change.norm() <= ROUNDING * size)


def _drawn(
    output: str, drawn: list[str], loaded: LoadedModel, batch: Mapping[str, Tensor]
) -> InputError:
    others = [name for name in loaded.accepts if name not in batch]
    ask = f"give what it draws as an input, if it is one of {', '.join(others)}" if others else ""
    by = f" ({', '.join(drawn)})" if drawn else ""
    return InputError(
        f"{type(loaded.module).__name__} draws random numbers while it computes{by}: {output} "
        "differs each time for the same inputs",
        fix=", or ".join(filter(None, (ask, "wrap it by --model in a module that draws none"))),
    )
