"""What a base's tensors are in its model: from the module, or by their names alone.

A file says which matrices changed, not which of them belong to linear layers, are stored (in, out)
or are no parameters. The module knows; where none can be built, the names of the field's
conventions tell most of it, which is enough for a fit to the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from kilodelta.files.checkpoint import Checkpoint, read_config
from kilodelta.models import layer_names
from kilodelta.models.layers import kinds, layer_weights
from kilodelta.models.loaded import LoadedModel

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "position_ids")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Names of tensors by what they are; all are names of the base's files.

    Attributes:
        layers: weights of linear, convolution and recurrent layers, of attention's packed
            projections, of routers and of experts: the targets where nobody names others.
        transposed: weights that are stored (in, out), as GPT-2's Conv1D does.
        stacked: tensors (experts, rows, columns) of which every matrix is a target.
        buffers: what is no parameter, such as running statistics.
        placed: parameters of the module; None where there is no module, and none is needed.
        aliases: further names of tied parameters, which files leave out. A pattern that matched
            one would move the target to a name that no file has.
    """

    layers: frozenset[str]
    transposed: frozenset[str] = frozenset()
    stacked: frozenset[str] = frozenset()
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

    def of(*chosen: str) -> frozenset[str]:
        states = (state for state, kind in kinds(student.module) if kind in chosen)
        return frozenset(stored[state] for state in states if state in stored)

    return Structure(
        layers=layer_weights(student.module, names),
        transposed=of("conv1d", "experts_in_out"),
        stacked=of("experts", "experts_in_out"),
        buffers=frozenset(name for name, state in names.items() if state not in parameters),
        placed=frozenset(name for name, state in names.items() if state in parameters),
        aliases=frozenset(name for name in parameters if name not in stored),
    )


def by_names(base: Checkpoint) -> Structure:
    """Guess the structure from names and `config.json`; the module cannot be built.

    Every matrix is a layer's but the tables of embeddings and what has a side of 1; a tensor of
    three dimensions that is named after experts is a stack of them.
    """
    config = read_config(base)
    matrices = [
        name
        for name in base.names
        if len(base.info(name).shape) >= 2 and _is_matrix(base.info(name).shape)
    ]
    stacked = frozenset(
        name
        for name in matrices
        if len(base.info(name).shape) == 3 and layer_names.is_of_experts(name)
    )
    weights = (n for n in matrices if n.endswith("weight") and not layer_names.is_embedding(n))
    return Structure(
        layers=frozenset(weights) | stacked,
        stacked=stacked,
        transposed=frozenset(name for name in matrices if layer_names.is_conv1d(name, config)),
        buffers=frozenset(name for name in base.names if name.endswith(_BUFFERS)),
    )


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return min(shape[0], prod(shape[1:])) > 1
