"""Recognise weights of ModelOpt: FP8, NVFP4, and INT4 without AWQ."""

from __future__ import annotations

from kilodelta.errors import CheckpointError
from kilodelta.grid.layouts.modelopt import ModelOptInt4, ModelOptNvfp4
from kilodelta.grid.model import Stored
from kilodelta.grid.readers.common import (
    AGAIN,
    Module,
    matrix_shape,
    refuse_swizzled,
)
from kilodelta.grid.readers.fp8 import read_fp8


def read_modelopt(module: Module) -> Stored | None:
    """Find a weight of ModelOpt: NVFP4 or FP8; None where there is none.

    Raises:
        CheckpointError: the layout is recognised and not read, or a part is missing.
    """
    roles = module.roles
    weight = roles.get("weight")
    if "pre_quant_scale" in roles:
        raise CheckpointError(
            f"{roles['pre_quant_scale'].name}: AWQ scaled the columns of this weight and folded the"
            " inverse into other layers' norms, so an update of the float model fits neither",
            fix="quantise without AWQ (INT4 round to nearest, FP8 or NVFP4)",
        )
    if weight is None or weight.dtype != "U8":
        return read_fp8(module)
    rows, width = matrix_shape(weight)
    scale = roles.get("weight_scale")
    if scale is not None and scale.dtype == "F8_E4M3":
        refuse_swizzled(scale, (rows, -(-2 * width // ModelOptNvfp4.GROUP)))
        wanted = ("weight", "weight_scale", "weight_scale_2")
        return module.stored(ModelOptNvfp4(shape=(rows, 2 * width)), wanted)
    if scale is not None and scale.dtype == "U8":
        raise CheckpointError(
            f"{weight.name}: MXFP4 (U8 scales) is not read", fix="quantise to NVFP4, FP8 or INT4"
        )
    if scale is None or len(scale.shape) != 2 or not scale.shape[1]:
        raise CheckpointError(f"{weight.name} is U8 without weight_scale per group", fix=AGAIN)
    group, left = divmod(width, scale.shape[1])
    stated = module.config.get("group_size")
    if left or (type(stated) is int and 0 < stated != group and not _is_mixed(module)):
        raise CheckpointError(
            f"{weight.name}: {width} columns in {scale.shape[1]} groups, and the configuration"
            f" states groups of {stated!r:.20}",
            fix="quantise with a group that divides the columns",
        )
    layout = ModelOptInt4(shape=(2 * rows, width), group=group)
    return module.stored(layout, ("weight", "weight_scale"))


def _is_mixed(module: Module) -> bool:
    """Return whether layers have schemes of their own, whose groups are not the stated one."""
    return "quantized_layers" in module.config
