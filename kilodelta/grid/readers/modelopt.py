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
    if "weight_scale_2" in roles and roles.get("weight_scale", weight).dtype == "F8_E4M3":
        refuse_swizzled(roles["weight_scale"], (rows, -(-2 * width // ModelOptNvfp4.GROUP)))
        wanted = ("weight", "weight_scale", "weight_scale_2")
        return module.stored(ModelOptNvfp4(shape=(rows, 2 * width)), wanted)
    scale = roles.get("weight_scale")
    if scale is None or len(scale.shape) != 2 or not scale.shape[1]:
        raise CheckpointError(f"{weight.name} is U8 without weight_scale per group", fix=AGAIN)
    layout = ModelOptInt4(shape=(2 * rows, width), group=-(-width // scale.shape[1]))
    return module.stored(layout, ("weight", "weight_scale"))
