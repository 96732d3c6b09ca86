"""Check what `attach` is given, before it touches the model."""

from __future__ import annotations

from torch import nn

from kilodelta.compress.training.sites import AttachedTarget, Site
from kilodelta.errors import InputError
from kilodelta.files.untrusted import FieldError
from kilodelta.format.methods import METHODS, Method
from kilodelta.format.targets import Target


def check_options(method: Method, seed: int) -> None:
    """Check that a method and its options are what a file can hold.

    Raises:
        InputError: they are not; the message names the option.
    """
    if not isinstance(method, Method):
        kinds = ", ".join(kind.__name__ for kind in METHODS.values())
        raise InputError(f"{method!r} is not a method", fix=f"give one of {kinds}, with options")
    if not 0 <= seed < 1 << 64:
        raise InputError(f"seed {seed} is not a 64-bit integer", fix="choose 0 .. 2^64 - 1")
    options = method.to_manifest()
    del options["name"]
    for option, value in options.items():
        try:
            method.checks[option](value, f"{type(method).__name__}.{option}")
        except FieldError as problem:
            raise InputError(str(problem), fix="give a value in the range that it names") from None


def check_place(place: AttachedTarget, method: Method) -> None:
    """Check that a target can be attached.

    Raises:
        InputError: it cannot; the message names the target and the layer.
    """
    check_rank(place.target, method)
    for site in place.sites:
        if getattr(site.owner, "max_norm", None) is not None:
            raise _refused(place, site, "rewrites its weights as it runs (max_norm)")


def check_rank(target: Target, method: Method) -> None:
    """Check that a target takes a method's rank, as whoever reads the file will.

    Raises:
        InputError: the rank is larger than both of its sides.
    """
    if method.rank > max(target.matrix):
        raise InputError(
            f"rank {method.rank} is larger than both sides of {target.name} {target.shape}",
            fix="choose a smaller rank, or exclude it",
        )


def _refused(place: AttachedTarget, site: Site, why: str) -> InputError:
    return InputError(
        f"{place.target.name} belongs to a {type(site.owner).__name__}, which {why}",
        fix="exclude it",
    )


def check_free(model: nn.Module, name: str, kind: type[nn.Module]) -> None:
    """Check that nothing is attached to a model, and that the name `name` is free in it.

    Raises:
        InputError: one of the two is not so.
    """
    if any(isinstance(module, kind) for module in model.modules()):
        raise InputError(
            f"a delta is attached to this {type(model).__name__} already",
            fix="kilodelta.train.detach(model) first; `switch` goes between several",
        )
    if hasattr(model, name):
        raise InputError(
            f"the model has an attribute {name!r}, the name that attach gives to its coefficients",
            fix="rename the attribute",
        )
