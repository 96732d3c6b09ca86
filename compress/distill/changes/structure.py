"""What a base's tensors are in its model: from the module, or by their names alone.

A file says which matrices changed, not which of them belong to linear layers, are stored (in, out)
or are no parameters. The module knows; where none can be built, the names of the field's
conventions tell most of it, which is enough for a fit to the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import nn

from kilodelta.compress.training.sites import is_conv1d
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.models import layer_names
from kilodelta.models.loaded import LoadedModel
from kilodelta.models.stacked import is_stacked

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "position_ids")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Names of tensors by what they are; all are names of the base's files.

    Attributes:
        layers: weights of linear and convolution layers, of attention's packed projections and of
            routers: the targets where nobody names others.
        transposed: weights that are stored (in, out), as GPT-2's Conv1D does.
        buffers: what is no parameter, such as running statistics.
        placed: parameters of the module; None where there is no module, and none is needed.
        aliases: further names of tied parameters, which files leave out. A pattern that matched
            one would move the target to a name that no file has.
    """

    layers: frozenset[str]
    transposed: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    placed: frozenset[str] | None = None
    aliases: frozenset[str] = frozenset()


def from_module(student: LoadedModel, names: Mapping[str, str]) -> Structure:
    """Read the structure off a module.

    Args:
        student: the model.
        names: checkpoint name to state name.
    """
    stored = {state: name for name, state in names.items()}
    parameters = dict(student.module.named_parameters(remove_duplicate=False))
    kinds = dict(_kinds(student.module))
    return Structure(
        layers=frozenset(stored[n] for n, kind in kinds.items() if n in stored and kind != "other"),
        transposed=frozenset(stored[n] for n, k in kinds.items() if n in stored and k == "conv1d"),
        buffers=frozenset(name for name, state in names.items() if state not in parameters),
        placed=frozenset(name for name, state in names.items() if state in parameters),
        aliases=frozenset(name for name in parameters if name not in stored),
    )


def by_names(base: Checkpoint) -> Structure:
    """Guess the structure from names and `config.json`; the module cannot be built.

    Every matrix is a layer's but the tables of embeddings and what has a side of 1.
    """
    config = layer_names.read_config(base)
    matrices = [
        name
        for name in base.names
        if len(base.info(name).shape) >= 2 and _is_matrix(base.info(name).shape)
    ]
    return Structure(
        layers=frozenset(
            name
            for name in matrices
            if name.endswith("weight") and not layer_names.is_embedding(name)
        ),
        transposed=frozenset(name for name in matrices if layer_names.is_conv1d(name, config)),
        buffers=frozenset(name for name in base.names if name.endswith(_BUFFERS)),
    )


def _kinds(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield every parameter's state name with its kind: `linear`, `conv1d` or `other`."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for attribute, parameter in owner._parameters.items():
            if parameter is not None:
                name = f"{path}.{attribute}" if path else attribute
                yield name, _kind(owner, attribute, tuple(parameter.shape))


def _kind(owner: nn.Module, attribute: str, shape: tuple[int, ...]) -> str:
    if isinstance(owner, nn.MultiheadAttention):  # it holds its projections as bare parameters
        return "linear" if attribute.endswith("proj_weight") else "other"
    if is_stacked(owner):  # matrices of experts, as linear layers store them
        return "linear"
    if attribute != "weight" or len(shape) < 2:
        return "other"
    if is_conv1d(owner):
        return "conv1d"
    if isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)):
        return "linear"
    return "linear" if _is_router(owner, shape) else "other"


def _is_router(owner: nn.Module, shape: tuple[int, ...]) -> bool:
    """Return whether a module is a mixture's router: a bare (experts, width) matrix."""
    kind = type(owner).__name__
    return len(shape) == 2 and _is_matrix(shape) and kind.endswith(("Router", "Gate"))


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return min(shape[0], prod(shape[1:])) > 1
