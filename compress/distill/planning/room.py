"""Judge before the first step whether memory holds its activations.

A GPU that is full raises an error, after which a step is computed in pieces (`learn/pieces.py`). A
machine that is full kills the process. So on a CPU the pieces are chosen before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.outputs import run
from kilodelta.compress.distill.planning.memory import available, counting_kept
from kilodelta.errors import InputError
from kilodelta.models import LoadedModel
from kilodelta.sizes import byte_label


def rows_that_fit(student: LoadedModel, data: Data, batch: int) -> int:
    """Count the rows of a batch whose activations fit into memory at once, 1 to `batch`.

    Args:
        student: its delta attached.
        data: what it learns from; the longest row is tried.
        batch: rows of a training batch.

    Raises:
        InputError: a single row does not fit; both numbers are said.
    """
    device = next(student.module.parameters()).device
    free = available(device)
    if device.type != "cpu" or free is None or data.survey.one_row:
        return batch
    longest = max(data.learned, key=data.rows.length)
    one, two = (_needed(student, data, [longest] * rows) for rows in (1, 2))
    each = max(1, two - one)
    count = int((free - (one - each)) // each)
    if count < 1:
        raise InputError(
            f"a step on one input of {data.rows.length(longest)} tokens takes {byte_label(one)},"
            f" and {byte_label(free)} are free",
            fix="give a smaller --max-length, --gradient-checkpointing, or a machine with more"
            " memory",
        )
    return min(batch, count)


def _needed(student: LoadedModel, data: Data, chosen: Sequence[int]) -> int:
    """Return the bytes that a step on some rows takes beside the model, in its backward pass."""
    with torch.enable_grad(), counting_kept(student.module) as kept:
        outputs = run(student, data.rows.batch(chosen))
        draws = torch.Generator().manual_seed(0)
        data.objective.loss(outputs, data.teacher(chosen), data.rows.mask(chosen), draws)
    return kept.nbytes + 2 * kept.largest
