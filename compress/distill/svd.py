"""Without inputs: what fitting weights alone can do.

Coefficients of random bases capture a share k / N of the change's energy (k coefficients, N
weights), which is next to nothing; only factors chosen from the change itself, a truncated SVD
(Eckart and Young, 1936), keep a useful part, at LoRA's size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kilodelta.compress.training import train
from kilodelta.compress.training.attachment import Attachment
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.methods import Lora, Method
from kilodelta.format.targets import Target
from kilodelta.models import LoadedModel
from kilodelta.models.weights import tensor


def refuse_without_inputs(method: Method, targets: Mapping[str, Target]) -> None:
    """Say what weight-space fitting cannot do.

    Raises:
        InputError: the method's coefficients need inputs to be trained on.
    """
    if isinstance(method, Lora):
        return
    groups = [g for target in targets.values() for g in method.groups(target)]
    count = sum(group.size for group in (*method.shared(), *groups))
    weights = sum(target.matrix[0] * target.matrix[1] for target in targets.values())
    raise InputError(
        f"without inputs, {method.name} could be fitted to the weights only: {count} coefficients "
        f"of random bases keep {count / weights:.2%} of the change's energy",
        fix="give --inputs to distil, or --method lora for a truncated SVD with its measured error",
    )


def change_of(base: Checkpoint, tuned: Checkpoint, target: Target) -> Tensor:
    """What the fine-tune added to a target, float32 (out, in)."""
    change = tensor(tuned, target.name).float() - tensor(base, target.name).float()
    matrix = change.reshape(target.stored)
    return matrix.T if target.transposed else matrix


def start_from_svd(loaded: LoadedModel, base: Checkpoint, tuned: Checkpoint) -> None:
    """Set an attached LoRA's factors to the truncated SVD of every target's change, the singular
    values shared evenly between both."""
    attachment = train.attached(loaded.module)
    with torch.no_grad():
        for place, groups in zip(attachment.places, attachment.own, strict=True):
            left, right = factors(change_of(base, tuned, place.target), attachment.method.rank)
            groups.get_parameter("B").copy_(left)
            groups.get_parameter("A").copy_(right)


def factors(change: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B (out, r), A (r, in)) with B A the best approximation of rank r."""
    rank_there = min(rank, *change.shape)
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    root = S[:rank_there].sqrt()
    left = torch.zeros(change.shape[0], rank)
    right = torch.zeros(rank, change.shape[1])
    left[:, :rank_there] = U[:, :rank_there] * root
    right[:rank_there] = root[:, None] * Vh[:rank_there]
    return left, right


def weight_error(attachment: Attachment, base: Checkpoint, tuned: Checkpoint) -> float:
    """||delta - change|| / ||change|| over all targets: 0 all of it kept, 1 nothing."""
    missed = whole = 0.0
    with torch.no_grad():
        for index, place in enumerate(attachment.places):
            change = change_of(base, tuned, place.target)
            missed += float((attachment.update(index).matrix() - change).double().square().sum())
            whole += float(change.double().square().sum())
    return float((missed / max(whole, 1e-60)) ** 0.5)
