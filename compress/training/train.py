"""Train a delta in the loop you have: attach, train, save.

```python
from kilodelta import train

model = train.attach(model, train.Nola(rank=8, bases=256), "encoder.*.weight")
...                               # any loop: only the coefficients get gradients
train.quantise(model, bits=4)     # the last steps: with the numbers that the file will hold
...
train.save(model, "task.kd", base="model/")
```

Methods (arXiv): NOLA 2310.02556, RandLoRA 2502.00987, LoRA 2106.09685, VeRA 2310.11454, Uni-LoRA
2506.00799; a method's `rate` is a learning rate of Adam to start with. A method that was registered
(docs/add_a_method.md) is found here by its class name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from torch import nn

from kilodelta.compress.training.attachment import NAME, Attachment
from kilodelta.compress.training.checks import check_free, check_options, check_place
from kilodelta.compress.training.conversion import Made, check_names, convert
from kilodelta.compress.training.frozen import Frozen
from kilodelta.compress.training.sites import checkpoint_names, find
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.methods import METHODS, Method
from kilodelta.format.methods import Lora as Lora
from kilodelta.format.methods import Nola as Nola
from kilodelta.format.methods import RandLora as RandLora
from kilodelta.format.methods import UniLora as UniLora
from kilodelta.format.methods import Vera as Vera
from kilodelta.models.huggingface import names_by_twin
from kilodelta.progress import Progress, silent

__all__ = [
    "Attachment",
    "Lora",
    "Nola",
    "RandLora",
    "UniLora",
    "Vera",
    "attach",
    "attached",
    "detach",
    "quantise",
    "save",
    "switch",
    "to_delta",
]

M = TypeVar("M", bound=nn.Module)
BITS = 8
"""Bits of a delta that was never quantised in training."""
NONE: Mapping[str, Any] = MappingProxyType({})


def attach(
    model: M,
    method: Method,
    targets: str | Sequence[str],
    *,
    seed: int = 0,
    exclude: str | Sequence[str] = (),
    extras: str | Sequence[str] = (),
    names: Mapping[str, str] = NONE,
    base: str | os.PathLike[str] | Checkpoint | None = None,
) -> M:
    """Freeze a model and let it compute with base plus update; only coefficients get gradients.

    The update starts at zero (Uni-LoRA without an anchor: nearly). The model keeps its class, its
    layers and their names, and gains the submodule `kilodelta`. While attached, its `state_dict`
    holds the coefficients and the extras only, and `load_state_dict` takes that, so training
    checkpoints are small; `detach` gives the base back untouched.

    Tied parameters are one target. A matrix that another module than its owner uses by hand
    (`x @ self.embedding.weight`) is seen there without its update: tie it, or exclude it.

    Args:
        model: any module; it is changed in place, and returned.
        method: such as `Nola(rank=8, bases=256)`.
        targets: globs over tensor names, one or several, `*` matching dots too; every float tensor
            of two or more dimensions that matches is a target, of stacked experts every matrix.
        seed: of the random bases, 0 .. 2^64 - 1, and of the start.
        exclude: globs of what is no target after all.
        extras: globs of tensors that are trained, and stored, whole: a new head, biases, norms.
        names: checkpoint name to state name where they differ, as `LoadedModel.names`; all
            patterns are over checkpoint names.
        base: the model on disk. Names are then read from it (transformers renames many tensors
            while loading), and a target that it lacks is refused here rather than by `save`.

    Raises:
        BaseMismatchError: the base has no tensor of a target's name.
        CheckpointError: transformers makes a tensor of the model out of several of the base's.
        InputError: a pattern chooses nothing, a layer cannot be attached, the model has a delta
            attached, or an option or the seed is out of range.

    Example:
        >>> model = attach(nn.Sequential(nn.Linear(4, 3)), Lora(rank=1), "*.weight")
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['kilodelta.targets.0/weight.A', 'kilodelta.targets.0/weight.B']
    """
    check_free(model, NAME, Attachment)
    check_options(method, seed)
    checkpoint = None if base is None else Checkpoint.open(base)
    if checkpoint is not None and not names:
        names = names_by_twin(model, checkpoint) or NONE
    patterns, places = find(model, _globs(targets), _globs(exclude), names)
    for place in places:
        check_place(place, method)
    if checkpoint is not None:
        check_names(places, checkpoint)
    chosen = [place.target.tensor for place in places]
    frozen = Frozen(checkpoint_names(model, names), _globs(extras), chosen)
    Attachment(method, patterns, places, frozen, seed).install(model)
    return model


def _globs(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def attached(model: nn.Module) -> Attachment:
    """Return a model's attachment.

    Raises:
        InputError: it has none.
    """
    attachment = model._modules.get(NAME)
    if not isinstance(attachment, Attachment):
        raise InputError(
            f"no delta is attached to this {type(model).__name__}",
            fix="kilodelta.train.attach(model, method, targets); for a wrapped model give the one"
            " that was attached",
        )
    return attachment


def detach(model: nn.Module) -> Attachment:
    """Restore the model bit for bit; the attachment that is returned keeps what was trained.

    Raises:
        InputError: nothing is attached.
    """
    attachment = attached(model)
    attachment.remove(model)
    return attachment


def switch(model: M, attachment: Attachment) -> M:
    """Attach what `detach` returned, in place of what is attached now, if anything is.

    Raises:
        InputError: the attachment belongs to another model.
    """
    if not attachment.fits(model):
        raise InputError(
            f"the attachment was not made for this {type(model).__name__}",
            fix="attach to the model that it was detached from",
        )
    if NAME in model._modules:
        detach(model)
    attachment.install(model)
    return model


def quantise(model: nn.Module, bits: int | None) -> None:
    """Compute, from now on, with what a file of so many bits holds, gradients straight through.

    Outputs are then those of the saved and merged file, to float32 rounding. Call it before the
    last fifth of the steps, so that the coefficients learn with their rounding.

    Args:
        model: an attached model.
        bits: 4, 8 or 16; None goes back to exact coefficients.

    Raises:
        InputError: nothing is attached, or the method cannot have so many bits.

    Example:
        >>> model = attach(nn.Sequential(nn.Linear(8, 16)), Lora(rank=1), "*.weight")
        >>> quantise(model, bits=4)
        >>> attached(model).precision.bits
        4
    """
    attached(model).quantise(bits)


def to_delta(
    model: nn.Module,
    base: str | os.PathLike[str] | Checkpoint | None = None,
    *,
    bits: int | None = None,
    name: str = "",
    made: Made = NONE,
    progress: Progress = silent,
) -> Delta:
    """Make the attached model's delta: quantised, checked against its base, its result proved.

    Args:
        model: an attached model.
        base: the model on disk that the delta is for; by default the model itself as it was
            before it was attached, under its own tensor names.
        bits: 4, 8 or 16; by default those of `quantise`, else 8.
        name: what the base is called, for people.
        made: how it was made, for people and tools.
        progress: receives how far the work is.

    Raises:
        BaseMismatchError: `base` is not what the model was made from.
        InputError: nothing is attached, coefficients are not finite, or something changed that
            the delta would not hold.
    """
    attachment = attached(model)
    precision = attachment.precision
    if precision is None or bits not in (None, precision.bits):
        precision = attachment.precision_for(bits or BITS)
    return convert(
        model, attachment, base, precision=precision, name=name, made=made, progress=progress
    )


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint | None = None,
    *,
    bits: int | None = None,
    name: str = "",
    made: Made = NONE,
    progress: Progress = silent,
) -> int:
    """Write the attached model's delta as a `.kd` file; return its bytes.

    Args:
        model: an attached model.
        path: the file; an old one is replaced.
        base, bits, name, made, progress: as for `to_delta`.

    Raises:
        OutputError: it cannot be written there.
        BaseMismatchError, InputError: as `to_delta`.

    Example:
        >>> import tempfile
        >>> model = attach(nn.Sequential(nn.Linear(8, 16)), Lora(rank=1), "*.weight", seed=7)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nbytes = save(model, os.path.join(folder, "task.kd"), bits=8)
        >>> nbytes < 1000
        True
    """
    delta = to_delta(model, base, bits=bits, name=name, made=made, progress=progress)
    return delta.save(path)


def __getattr__(name: str) -> Any:
    """Return the class of a method that is registered, and not among the imports above."""
    for kind in METHODS.values():
        if kind.__name__ == name:
            return kind
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
