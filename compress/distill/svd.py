"""Without inputs: what fitting weights alone can do, and how far any file is from the change.

Coefficients of random bases capture a share k / N of the change's energy (k coefficients, N
weights), which is next to nothing; only factors chosen from the change itself, a truncated SVD
(Eckart and Young, 1936), keep a useful part, at LoRA's size. It needs no module: a model of any
architecture can be fitted from its files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kilodelta.compress.distill.changes.compare import Change, energy
from kilodelta.compress.training.attachment import Attachment
from kilodelta.compress.training.checks import check_rank
from kilodelta.errors import InputError
from kilodelta.files import dtypes
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora, Method
from kilodelta.format.quantise import Quantised
from kilodelta.format.targets import Target
from kilodelta.merging.build import quantise_target
from kilodelta.merging.low_rank import truncated
from kilodelta.models.weights import tensor, values
from kilodelta.progress import Event, Progress


def refuse_without_inputs(method: Method, targets: Sequence[Target]) -> Lora:
    """Return the method if weights alone can fit it.

    Raises:
        InputError: the method's coefficients need inputs to be trained on, or its rank is larger
            than a target.
    """
    if isinstance(method, Lora):
        for target in targets:
            check_rank(target, method)
        return method
    groups = [group for target in targets for group in method.groups(target)]
    count = sum(group.size for group in (*method.shared(), *groups))
    weights = sum(target.matrix[0] * target.matrix[1] for target in targets)
    raise InputError(
        f"without inputs, {method.name} could be fitted to the weights only: {count} coefficients "
        f"of random bases keep {count / weights:.2%} of the change's energy",
        fix="give --inputs to distil, or --method lora for a truncated SVD with its measured error",
    )


def change_of(base: Checkpoint, tuned: Checkpoint, target: Target) -> Tensor:
    """Return what the fine-tune added to a target, float32 (out, in)."""
    change = matrix_of(tuned, target).float() - matrix_of(base, target).float()
    matrix = change.reshape(target.stored)
    return matrix.T if target.transposed else matrix


def matrix_of(checkpoint: Checkpoint, target: Target) -> Tensor:
    """Return a target as the files store it: a tensor, or one matrix of a stack."""
    if target.part is None:
        return tensor(checkpoint, target.tensor)
    kind = checkpoint.info(target.tensor).dtype
    size = dtypes.nbytes(kind, target.shape)  # a stack may take gigabytes: read this one alone
    data = checkpoint.tensor(target.tensor)[target.part * size : (target.part + 1) * size]
    return values(RawTensor(dtype=kind, shape=target.shape, data=data.copy()))


def fit(
    base: Checkpoint,
    tuned: Checkpoint,
    targets: Sequence[Target],
    method: Lora,
    bits: int,
    progress: Progress,
) -> dict[str, dict[str, Quantised]]:
    """Fit a LoRA to the weights: the rounded factors of every target's change.

    Args:
        base: the base model.
        tuned: the tuned model, its tensors under the base's names.
        targets: what is to change.
        method: LoRA with its rank.
        bits: bits of a coefficient.
        progress: told about every target.

    Returns:
        Coefficients by target and group.
    """
    found = {}
    for done, target in enumerate(targets, 1):
        left, right = factors(change_of(base, tuned, target), method.rank)
        floats = {"A": right.numpy(), "B": left.numpy()}
        found[target.name] = quantise_target(method, floats, bits)
        progress(Event(stage="fit", done=done, total=len(targets), unit="targets"))
    return found


def start_from_svd(attachment: Attachment, base: Checkpoint, tuned: Checkpoint) -> None:
    """Set an attached LoRA's factors to the truncated SVD of every target's change."""
    with torch.no_grad():
        for place, groups in zip(attachment.places, attachment.own, strict=True):
            left, right = factors(change_of(base, tuned, place.target), attachment.method.rank)
            groups.get_parameter("B").copy_(left)
            groups.get_parameter("A").copy_(right)


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factorise a change, (out, in), with the singular values shared evenly between both factors.

    Returns:
        B (out, rank) and A (rank, in) with B A the best approximation of that rank.

    Example:
        >>> B, A = factors(torch.tensor([[0.0, 4.0], [0.0, 0.0]]), rank=1)
        >>> (B @ A).round().tolist()
        [[0.0, 4.0], [0.0, 0.0]]
    """
    B, A = (torch.from_numpy(factor) for factor in truncated(change.numpy(), rank))
    left, right = torch.zeros(change.shape[0], rank), torch.zeros(rank, change.shape[1])
    left[:, : B.shape[1]], right[: A.shape[0]] = B, A
    return left, right


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one target's update carries.

    Attributes:
        name: the target.
        relative_norm: norm of the update over the norm of the base's tensor.
        explained: share of the fine-tune's own change that it carries: 1 is all, 0 nothing, and
            less than that where it leads elsewhere, as updates do that were trained on outputs.
    """

    name: str
    relative_norm: float
    explained: float


def compare_weights(
    delta: Delta, base: Checkpoint, tuned: Checkpoint, changes: Sequence[Change]
) -> tuple[float, tuple[Layer, ...]]:
    """Measure how far a file is from the whole change.

    Args:
        delta: bound to the base; what it neither changes nor stores counts as missed.
        base: the base model.
        tuned: the tuned model, its tensors under the base's names.
        changes: everything that differs.

    Returns:
        ||what is missed|| / ||the whole change||, over all tensors that both models have: 0 where
        all of it is kept, 1 where nothing is; and each target's own figures.
    """
    carried = {*delta.tensors, *delta.extras}
    missed = energy([change for change in changes if change.name not in carried])
    layers = []
    for name, target in delta.targets.items():
        update, change = torch.from_numpy(delta.update(name)), change_of(base, tuned, target)
        error, whole = _energy(update - change), _energy(change)
        missed += error
        size = _energy(matrix_of(base, target))
        layers.append(
            Layer(
                name=name,
                relative_norm=(_energy(update) / max(size, 1e-60)) ** 0.5,
                explained=1 - error / max(whole, 1e-60),
            )
        )
    return float((missed / max(energy(changes), 1e-60)) ** 0.5), tuple(layers)


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())
