"""Survey a model's outputs: find which of them count, and what their axes mean, by asking it.

An output's shape alone does not tell where the rows, the tokens and the classes are. So the model
is asked: a second row shows which axes follow the rows, and a shorter text which axes follow the
tokens. What is left is one axis of classes or features, and positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from kilodelta.compress.distill.learn.outputs import Kind, Output, Outputs, Wanted, run
from kilodelta.compress.distill.learn.rows import Rows
from kilodelta.errors import InputError
from kilodelta.models import LoadedModel
from kilodelta.models.heads import EMBEDDING

T = TypeVar("T")
_Lengths: TypeAlias = tuple[tuple[int, Outputs], tuple[int, Outputs]]
"""A shorter and a longer row: tokens, and what the model puts out for it alone."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What looking at a model's outputs found.

    Attributes:
        matched: the outputs that are distilled.
        ignored: why each other output is not, by its name.
        one_row: whether the model computes one row at a time only.
        padded: whether rows of several lengths may share a batch. Not where an output has an axis
            that follows the tokens at another rate (frames of audio): nothing says how many of
            its positions are padding.
        cells: numbers of the widest matched output of the longest row.
    """

    matched: tuple[Output, ...]
    ignored: Mapping[str, str]
    one_row: bool
    padded: bool
    cells: int = 1


def survey(loaded: LoadedModel, rows: Rows, wanted: Wanted) -> Survey:
    """Compute a few rows with a model and tell what its outputs are.

    Args:
        loaded: the tuned model.
        rows: the inputs.
        wanted: what the user says.

    Raises:
        InputError: no output can be matched, or a name or axis that the user gave does not fit.
    """
    with torch.no_grad():
        alone = run(loaded, rows.batch([0]))
        both = _two_rows(loaded, rows)
        lengths = _two_lengths(loaded, rows)
    weights = _weights(alone, wanted)
    reasons = {name: _unfit(alone[name], None if both is None else both[name]) for name in weights}
    _check_chosen(reasons, wanted, loaded)
    padded, matched = bool(rows.pad), []
    for name in (name for name, reason in reasons.items() if not reason):
        follows, tokens = _along(name, alone[name], lengths, rows)
        padded = padded and follows == tokens
        kind, axis = _kind(name, alone[name], follows, wanted, loaded)
        size = 0 if axis is None or axis in follows else alone[name].shape[axis]
        matched.append(
            Output(
                name=name,
                kind=kind,
                weight=weights[name],
                axis=axis,
                size=size,
                token_axes=tokens,
            )
        )
    total = sum(output.weight for output in matched)
    return Survey(
        matched=tuple(replace(output, weight=output.weight / total) for output in matched),
        ignored={name: reason for name, reason in reasons.items() if reason},
        one_row=both is None,
        padded=padded,
        cells=_cells(matched, alone, rows),
    )


def _cells(matched: Sequence[Output], alone: Outputs, rows: Rows) -> int:
    """Judge by the first row how many numbers the longest row has in its widest output."""
    widest = max((alone[output.name].numel() for output in matched), default=1)
    return -(-widest * max(map(rows.extent, range(len(rows)))) // rows.extent(0))


def _two_rows(loaded: LoadedModel, rows: Rows) -> Outputs | None:
    """Run a row twice in one batch; None where the model takes one row at a time."""
    try:
        return run(loaded, rows.batch([0, 0]))
    except Exception:  # a module that was written, or traced, for one row may raise anything
        return None


def _two_lengths(loaded: LoadedModel, rows: Rows) -> _Lengths | None:
    """Run two rows of different lengths; None where no two can be had."""
    if not rows.pad:
        return None
    order = sorted(range(len(rows)), key=rows.length)
    short, long = rows.subset([order[0]]), rows.subset([order[-1]])
    if short.length(0) == long.length(0):
        if long.length(0) < 2:
            return None
        cut = {n: v[:-1] if n in rows.pad else v for n, v in long.rows[0].items()}
        short = Rows((cut,), rows.pad)
    try:
        found = [(part.length(0), run(loaded, part.batch([0]))) for part in (short, long)]
    except Exception:  # a module may take one length only; nothing is padded then
        return None
    return found[0], found[1]


def _weights(alone: Outputs, wanted: Wanted) -> dict[str, float]:
    """Return the outputs that are asked for, with how much each counts."""
    for pattern in (*wanted.weights, *wanted.classes):
        if not any(fnmatchcase(name, pattern) for name in alone):
            raise InputError(
                f"the model has no output {pattern}", fix=f"choose among {', '.join(alone)}"
            )
    if not wanted.weights:
        return dict.fromkeys(alone, 1.0)
    found = {name: _given(name, wanted.weights) for name in alone}
    return {name: weight for name, weight in found.items() if weight is not None}


def _given(name: str, table: Mapping[str, T]) -> T | None:
    """Look up what is said about an output, by its own name before globs."""
    if name in table:
        return table[name]
    return next((value for glob, value in table.items() if fnmatchcase(name, glob)), None)


def _unfit(alone: Tensor, both: Tensor | None) -> str:
    """Why an output cannot be matched row by row; empty where it can."""
    if not alone.is_floating_point():
        return f"is {str(alone.dtype).removeprefix('torch.')}, not floats"
    if alone.dim() == 0 or alone.numel() == 0:
        return "is one number for the whole batch" if alone.dim() == 0 else "is empty"
    if alone.shape[0] != 1 or (both is not None and both.shape[0] != 2):
        return f"has shape {tuple(alone.shape)} for one row: its first axis is not the rows'"
    if both is not None and both.shape[1:] != alone.shape[1:]:
        return (
            f"has shape {tuple(alone.shape)} for one row and {tuple(both.shape)} for two:"
            " it compares the rows of a batch with each other"
        )
    return ""


def _check_chosen(reasons: Mapping[str, str], wanted: Wanted, loaded: LoadedModel) -> None:
    named = [name for name, reason in reasons.items() if reason and name in wanted.weights]
    if named:
        raise InputError(
            f"output {named[0]} {reasons[named[0]]}, so it cannot be distilled",
            fix="choose others with --outputs",
        )
    if all(reasons.values()):
        listed = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
        raise InputError(
            f"{loaded.source} puts out nothing that can be distilled: {listed}",
            fix="give a model with outputs of floats for each row, or fit the weights by"
            " --method lora without --inputs",
        )


def _along(
    name: str, values: Tensor, lengths: _Lengths | None, rows: Rows
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the axes whose size changes with the number of tokens, and those that are as long."""
    if lengths is None:
        tokens = _as_long(values, rows.length(0)) if rows.pad else ()
        return tokens, tokens
    (_, short), (_, long) = lengths
    pair = short[name].shape, long[name].shape
    follows = tuple(a for a in range(1, len(pair[0])) if pair[0][a] != pair[1][a])
    return follows, tuple(a for a in follows if all(o[name].shape[a] == n for n, o in lengths))


def _as_long(values: Tensor, length: int) -> tuple[int, ...]:
    """Find the first axis as long as every row, where the model takes one length only."""
    return tuple(a for a in range(1, values.dim()) if values.shape[a] == length)[:1]


def _kind(
    name: str, values: Tensor, follows: Sequence[int], wanted: Wanted, loaded: LoadedModel
) -> tuple[Kind, int | None]:
    """Decide how an output is compared, and along which axis."""
    config = getattr(loaded.module, "config", None)
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    asked = _given(name, wanted.classes)
    if asked is not None:
        axis = _axis(name, asked, values)
        return ("span" if axis in follows else "labels" if several else "classes"), axis
    free = [axis for axis in range(1, values.dim()) if axis not in follows]
    last = name.rpartition(".")[2]
    if name == EMBEDDING and values.dim() == 2:
        return "embedding", 1
    if "logits" not in last:
        middle = _middle(values, free)
        number = middle is None or values.shape[middle] == 1
        return ("values", None) if number else ("states", middle)
    if last.startswith(("start", "end")) and values.dim() == 2 and not free:
        return "span", 1
    if not free or ("mask" in last and values.dim() >= 4):  # one yes or no per token, or pixel
        return "labels", None
    axis = _class_axis(values, free, config)
    if several:
        return "labels", axis
    return ("values", None) if values.shape[axis] == 1 else ("classes", axis)


def _axis(name: str, asked: int, values: Tensor) -> int:
    axis = asked + values.dim() if asked < 0 else asked
    if not 1 <= axis < values.dim():
        raise InputError(
            f"output {name} of shape {tuple(values.shape)} has no axis {asked} of classes",
            fix=f"give an axis from 1 to {values.dim() - 1}; axis 0 is the rows'",
        )
    return axis


def _middle(values: Tensor, free: Sequence[int]) -> int | None:
    """Return the axis of channels of an image's features, else the last."""
    if not free:
        return None
    return 1 if values.dim() >= 4 and 1 in free else free[-1]


def _class_axis(values: Tensor, free: Sequence[int], config: Any) -> int:
    """The axis that has as many entries as the configuration has labels or words; else, as torch's
    losses have it, the second of an output over an area, and the last of any other."""
    sizes = {getattr(config, "num_labels", None), getattr(config, "vocab_size", None)}
    fitting = [axis for axis in free if values.shape[axis] in sizes]
    if len(fitting) == 1:
        return fitting[0]
    found = _middle(values, free)
    assert found is not None  # the caller has looked
    return found
