"""Recognise weights of E4M3 codes: fine-grained, per row or per tensor."""

from __future__ import annotations

from typing import Any

from kilodelta.errors import CheckpointError
from kilodelta.grid.layouts.fp8 import Fp8
from kilodelta.grid.matrix import Shape
from kilodelta.grid.model import Stored
from kilodelta.grid.readers.common import (
    AGAIN,
    Module,
    config_groups,
    matrix_shape,
    weight_args,
)


def read_fp8(module: Module) -> Stored | None:
    """Find an FP8 (E4M3) weight, scaled per tensor, row or block; None where there is none.

    Raises:
        CheckpointError: the layout is recognised and not read, or a part is missing.
    """
    roles = module.roles
    weight = roles.get("weight")
    if weight is None or weight.dtype != "F8_E4M3":
        return None
    shape = matrix_shape(weight)
    scale = next((r for r in ("weight_scale_inv", "weight_scale") if r in roles), None)
    if scale is None:
        raise CheckpointError(
            f"{weight.name} is F8_E4M3 without weight_scale or weight_scale_inv", fix=AGAIN
        )
    if roles[scale].dtype == "F8_E8M0":
        raise CheckpointError(
            f"{roles[scale].name} is F8_E8M0, and such scales are not read",
            fix="give the model with float32 scales",
        )
    block = _fp8_block(module, shape, roles[scale].shape)
    return module.stored(Fp8(shape=shape, scale=scale, block=block), ("weight", scale))


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _fp8_block(module: Module, shape: Shape, scales: tuple[int, ...]) -> Shape:
    size = module.config.get("weight_block_size")
    if size is None and config_groups(module.config):
        size = weight_args(module.name, module.config, "float", bits=8).get("block_structure")
    if size is not None:
        if not (isinstance(size, list) and len(size) == 2 and all(map(_is_size, size))):
            raise CheckpointError(
                f"{module.name}: the configuration states blocks of {size!r:.40}, not of rows and"
                " columns",
                fix=AGAIN,
            )
        return size[0], size[1]
    if scales in ((shape[0], 1), (shape[0],)) and shape[0] > 1:
        return 1, shape[1]
    return max(shape[0], 1), max(shape[1], 1)
