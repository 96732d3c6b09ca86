"""Make a delta of trained coefficients: rounded, named as the base names them, proved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from kilodelta.compress.training.attachment import Attachment
from kilodelta.compress.training.precision import Precision
from kilodelta.compress.training.sites import AttachedTarget
from kilodelta.errors import BaseMismatchError, InputError
from kilodelta.files import safetensors, staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.files.tying import memory_of, untied
from kilodelta.format.delta import Delta
from kilodelta.format.quantise import Quantised
from kilodelta.merging.build import Recipe, build
from kilodelta.models.weights import TORCH, tensor
from kilodelta.progress import Progress, silent

Made = Mapping[str, str | int | float | bool]


def convert(
    model: nn.Module,
    attachment: Attachment,
    base: str | os.PathLike[str] | Checkpoint | None,
    *,
    precision: Precision,
    name: str,
    made: Made,
    progress: Progress = silent,
) -> Delta:
    """Make the delta of an attached model, bound to its base.

    Args:
        model: the attached model.
        attachment: what is attached to it.
        base: the model on disk; None takes the model itself as it was before.
        precision: how the coefficients are rounded.
        name: what the base is called, for people.
        made: how the delta was made, for people and tools.
        progress: receives how far the work is.

    Raises:
        BaseMismatchError: the model's frozen tensors are not the base's.
        InputError: something changed that the delta would not hold.
    """
    _check_buffers(model, attachment)
    with _checkpoint(model, attachment, base) as checkpoint:
        check_names(attachment.places, checkpoint)
        _check_frozen(model, attachment, checkpoint)
        recipe = Recipe(
            method=precision.method,
            patterns=attachment.patterns,
            seed=attachment.seed,
            bits=precision.bits,
            name=name,
            extras=_extras(model, attachment, checkpoint),
            made=made,
        )
        own, shared = quantised(attachment, precision)
        return build(checkpoint, recipe, own, shared, progress=progress)


def quantised(
    attachment: Attachment, precision: Precision
) -> tuple[dict[str, dict[str, Quantised]], dict[str, Quantised]]:
    """Round the coefficients as the file holds them: by target and group, and the shared groups.

    Raises:
        InputError: a coefficient is not finite.
    """
    own = {
        place.target.name: groups.quantised(precision, place.target.name)
        for place, groups in zip(attachment.places, attachment.own, strict=True)
    }
    return own, attachment.file.quantised(precision, "the whole file")


def check_names(places: Iterable[AttachedTarget], checkpoint: Checkpoint) -> None:
    """Check that the base has a tensor of every target's name.

    Raises:
        BaseMismatchError: it lacks one.
    """
    for place in places:
        if place.target.tensor not in checkpoint:
            present = [alias for alias in place.aliases if alias in checkpoint]
            advice = (
                f"the base calls it {present[0]}: use that in `targets`"
                if present
                else (
                    "give the base that the model was made from; where its files name tensors"
                    " otherwise, attach with `base=` (or `names=`) and patterns over their names"
                )
            )
            raise BaseMismatchError(
                f"the base {checkpoint.path} has no tensor {place.target.tensor}", fix=advice
            )


def _check_buffers(model: nn.Module, attachment: Attachment) -> None:
    drifted = attachment.frozen.drifted(model)
    if drifted:
        raise InputError(
            f"{drifted[0]} changed in training ({len(drifted)} such buffers) and is no extra",
            fix="name such buffers in `extras`, or keep their layers in eval mode",
        )


@contextmanager
def _checkpoint(
    model: nn.Module, attachment: Attachment, base: str | os.PathLike[str] | Checkpoint | None
) -> Iterator[Checkpoint]:
    """Open the base; where none is given, the model itself as it was before."""
    if base is not None:
        yield Checkpoint.open(base)
        return
    with staging.scratch() as folder:
        place = folder / "base.safetensors"
        _write(place, attachment.frozen.base(model))
        yield Checkpoint.open(place)


def _write(place: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as a safetensors file, tied ones once."""
    safetensors.write(place, {name: RawTensor.of(value) for name, value in untied(tensors).items()})


def _check_frozen(model: nn.Module, attachment: Attachment, checkpoint: Checkpoint) -> None:
    """Check that everything that the delta leaves out is the base's."""
    tensors = attachment.frozen.base(model)
    extras = set(attachment.frozen.trained(model))
    stored = {memory_of(value) for name, value in tensors.items() if name in checkpoint}
    for name, value in tensors.items():
        if name in extras or (name not in checkpoint and memory_of(value) in stored):
            continue
        if name not in checkpoint:
            raise InputError(
                f"{name} is neither in the base nor an extra, so the delta would lose it",
                fix=f"attach with extras=({name!r}, ...)",
            )
        if not _same(value, checkpoint, name):
            raise BaseMismatchError(
                f"the model's {name} is not the base's",
                fix="give the base that the model was made from",
            )


def _same(value: Tensor, checkpoint: Checkpoint, name: str) -> bool:
    info = checkpoint.info(name)
    if info.dtype not in TORCH or info.shape != tuple(value.shape):
        return False
    there = tensor(checkpoint, name).to(value.dtype)
    return torch.equal(value.detach().cpu(), there)


def _extras(
    model: nn.Module, attachment: Attachment, checkpoint: Checkpoint
) -> dict[str, RawTensor]:
    """Copy the extras, in the types in which the base keeps them."""
    extras = {}
    for name, value in attachment.frozen.trained(model).items():
        dtype = TORCH.get(checkpoint.info(name).dtype) if name in checkpoint else None
        extras[name] = RawTensor.copy_of(value if dtype is None else value.to(dtype))
    return extras
