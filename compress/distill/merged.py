"""Merge a delta into a module in memory: the very numbers that a merged file holds.

A student computes with base plus update in float32. A base in bfloat16 or float16 rounds every
merged weight, so what counts is measured on the merged weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import nn

from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.merging.cpu import merged
from kilodelta.merging.tensors import merged_whole
from kilodelta.models.weights import values, write


@torch.no_grad()
def fill_merged(
    module: nn.Module,
    delta: Delta,
    base: Checkpoint,
    names: Mapping[str, str],
    chosen: Collection[str] | None = None,
) -> None:
    """Put a delta's merged weights and extras into a module that holds the base.

    Args:
        module: computes in float32; a tensor that it has no place for is left out.
        delta: bound to the base.
        base: the base's files.
        names: checkpoint name to state name.
        chosen: the changed tensors to merge; all by default.
    """
    state = module.state_dict()
    for name in delta.tensors:
        if name in names and (chosen is None or name in chosen):
            info, before = base.info(name), base.data(name)
            parts = [part.copy() for part in merged_whole(delta, name, before, merged)]
            raw = RawTensor(dtype=info.dtype, shape=info.shape, data=np.concatenate(parts))
            write(state[names[name]], values(raw))
    for name, raw in delta.extras.items():
        if name in names:
            write(state[names[name]], values(raw))
