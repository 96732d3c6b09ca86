"""What `attach` refuses, before it touches the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from kilodelta.compress.training.sites import Place, Site
from kilodelta.errors import InputError
from kilodelta.format.methods import Method


def check_options(method: Method, seed: int, kinds: Collection[type[Any]]) -> None:
    """Whether a method and its options make sense.

    Raises:
        InputError: they do not.
    """
    if type(method) not in kinds:
        raise InputError(
            f"{method!r} is not a method",
            fix=f"give one of {', '.join(kind.__name__ for kind in kinds)}, with its options",
        )
    if not 0 <= seed < 1 << 64:
        raise InputError(f"seed {seed} is not a 64-bit integer", fix="choose 0 .. 2^64 - 1")
    for option in ("rank", "bases"):
        if getattr(method, option, 1) < 1:
            raise InputError(f"{option} is {getattr(method, option)}", fix="it must be 1 or more")
    if getattr(method, "basis", "sign") == "ternary" and getattr(method, "sparsity", 0) < 1:
        raise InputError(
            "a ternary basis needs its sparsity", fix="sparsity=3 keeps one entry in three"
        )


def check_place(place: Place, method: Method) -> None:
    """Whether a target can be attached.

    Raises:
        InputError: naming the target, and the layer that cannot.
    """
    if method.rank > max(place.target.matrix):
        raise InputError(
            f"rank {method.rank} is larger than both sides of {place.target.name}"
            f" {place.target.shape}",
            fix="choose a smaller rank, or exclude it",
        )
    for site in place.sites:
        if isinstance(site.owner, nn.RNNBase):
            raise _refused(place, site, "keeps its weights in a list of its own")
        if getattr(site.owner, "max_norm", None) is not None:
            raise _refused(place, site, "rewrites its weights as it runs (max_norm)")


def _refused(place: Place, site: Site, why: str) -> InputError:
    return InputError(
        f"{place.target.name} belongs to a {type(site.owner).__name__}, which {why}",
        fix="exclude it",
    )


def check_free(model: nn.Module, name: str, kind: type[nn.Module]) -> None:
    """Whether nothing is attached to a model, and `name` is free in it.

    Raises:
        InputError: one of the two.
    """
    if any(isinstance(module, kind) for module in model.modules()):
        raise InputError(
            f"a delta is attached to this {type(model).__name__} already",
            fix="kilodelta.train.detach(model) first; `switch` goes between several",
        )
    if hasattr(model, name):
        raise InputError(
            f"the model has an attribute {name!r} of its own, which attach needs", fix="rename it"
        )
