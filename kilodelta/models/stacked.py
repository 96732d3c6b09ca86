"""Keep each matrix of a file a parameter of its own where transformers stacks several.

Mixtral, Qwen3-MoE, OLMoE, DeepSeek-V3 and their kin store every expert's matrices one by one;
transformers 5 loads them into one tensor `(experts, rows, columns)`, in which the rows of several
matrices (gate and up) lie one below the other. A delta changes the matrices of the file. So the
stacked parameter is parametrized: the module holds the file's matrices, each under a state name,
and stacks them whenever its forward pass reads the parameter. That costs one copy of a layer's
experts while the layer runs.

How a tensor was stacked is read off the twin's content, not off transformers' table of
conversions: what comes out is the same bytes, or the tensor is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kilodelta.models.twin import content_of


class Stacked(nn.Module):
    """A parametrization: matrices with equal columns become one tensor.

    Args:
        rows: of each matrix of one expert, in turn.
        experts: how many there are; 0 for one matrix that is no stack.
    """

    def __init__(self, rows: Sequence[int], experts: int) -> None:
        super().__init__()
        self.rows, self.experts = tuple(rows), experts

    def forward(self, *matrices: Tensor) -> Tensor:
        """Stack `(rows, columns)` matrices, those of the first expert first."""
        count = len(self.rows)
        groups = [matrices[at : at + count] for at in range(0, len(matrices), count)]
        whole = [torch.cat(group) if count > 1 else group[0] for group in groups]
        return torch.stack(whole) if self.experts else whole[0]

    def right_inverse(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """Cut a stacked tensor into its matrices, each in memory that no other shares."""
        each = stacked if self.experts else stacked[None]
        return tuple(part.clone() for one in each for part in one.split(self.rows))


def unstack(
    module: nn.Module, combined: Iterable[str], twin: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, str]:
    """Parametrize, in place, the parameters that are stacks of a checkpoint's matrices.

    Args:
        module: a model that transformers loaded with the twin.
        combined: state names of tensors that equal no single tensor of the twin.
        twin: the checkpoint's unique values by name.
        names: checkpoint name to state name, for what is known already.

    Returns:
        Checkpoint name to state name for the matrices of those parameters. A tensor that is no
        stack of whole matrices is left as it is.
    """
    free = {name: t for name, t in twin.items() if name not in names and t.ndim == 2 and t.numel()}
    first_row = {content_of(tensor[0]): name for name, tensor in free.items()}
    added: dict[str, str] = {}
    for place in combined:
        path, _, attribute = place.rpartition(".")
        owner = module.get_submodule(path)
        parameter = owner._parameters.get(attribute)
        parts = None if parameter is None else _parts(parameter, free, first_row)
        if parameter is None or parts is None:
            continue
        experts = len(parameter) if parameter.ndim == 3 else 0
        rows = [len(free[name]) for name in parts[: len(parts) // (experts or 1)]]
        parametrize.register_parametrization(owner, attribute, Stacked(rows, experts), unsafe=True)
        held = f"{path}.parametrizations.{attribute}.original".removeprefix(".")
        added |= {name: f"{held}{index}" for index, name in enumerate(parts)}
    return added


def _parts(
    stacked: Tensor, free: Mapping[str, Tensor], first_row: Mapping[str, str]
) -> list[str] | None:
    """Name the matrices that lie in a tensor, in order; None where it is not made of such alone.

    Every expert must have matrices of the same heights, or they could not be told apart again.
    """
    if stacked.ndim not in (2, 3):
        return None
    parts: list[str] = []
    heights = set()
    for one in stacked if stacked.ndim == 3 else stacked[None]:
        own = list(_below_each_other(one, free, first_row))
        parts += own
        heights.add(tuple(len(free[name]) for name in own))
        if sum(len(free[name]) for name in own) != len(one):
            return None
    return parts if len(heights) == 1 and len(set(parts)) == len(parts) else None


def _below_each_other(
    matrix: Tensor, free: Mapping[str, Tensor], first_row: Mapping[str, str]
) -> Iterator[str]:
    """Yield the names of the whole matrices that a matrix consists of, as far as it does."""
    at = 0
    while at < len(matrix):
        name = first_row.get(content_of(matrix[at]))
        if name is None or not torch.equal(free[name], matrix[at : at + len(free[name])]):
            return
        yield name
        at += len(free[name])


def is_stacked(owner: Any) -> bool:
    """Return whether a module holds the matrices of a stacked parameter."""
    return isinstance(owner, parametrize.ParametrizationList) and isinstance(owner[0], Stacked)
