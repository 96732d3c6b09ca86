"""Recognise weights of compressed-tensors: packed integers, NVFP4, and FP8."""

from __future__ import annotations

from kilodelta.errors import CheckpointError
from kilodelta.grid.layouts.compressed_tensors import Nvfp4Packed, PackQuantized
from kilodelta.grid.model import Stored
from kilodelta.grid.readers.common import (
    AGAIN,
    Module,
    group_size,
    matrix_shape,
    refuse_marlin,
    refuse_swizzled,
    weight_args,
)
from kilodelta.grid.readers.fp8 import read_fp8


def read_compressed_tensors(module: Module) -> Stored | None:
    """Find a weight of compressed-tensors: packed integers, NVFP4, FP8; None where there is none.

    Raises:
        CheckpointError: the layout is recognised and not read, or a part is missing.
    """
    roles = module.roles
    if "weight_packed" not in roles:
        return read_fp8(module)
    packed = roles["weight_packed"]
    rows, width = matrix_shape(packed)
    refuse_marlin(module.name, module.config)
    if packed.dtype == "U8":
        scale = roles.get("weight_scale")
        if "weight_global_scale" not in roles and scale is not None and scale.dtype == "U8":
            raise CheckpointError(
                f"{packed.name}: mxfp4-pack-quantized is not read",
                fix="quantise to nvfp4-pack-quantized or pack-quantized",
            )
        refuse_swizzled(scale, (rows, -(-2 * width // Nvfp4Packed.GROUP)))
        layout = Nvfp4Packed(shape=(rows, 2 * width))
        return module.stored(layout, ("weight_packed", "weight_scale", "weight_global_scale"))
    args = weight_args(module.name, module.config, "int")
    if "weight_shape" not in roles:
        raise CheckpointError(f"{module.name}: weight_packed has no weight_shape", fix=AGAIN)
    shape = tuple(map(int, module.source.raw(roles["weight_shape"].name).values().reshape(-1)))
    bits = args.get("num_bits")
    if len(shape) != 2 or shape[0] != rows or type(bits) is not int or not 1 <= bits <= 8:
        raise CheckpointError(
            f"{module.name}: weight_shape {list(shape)} and num_bits {bits!r:.20} do not fit"
            f" weight_packed {list(packed.shape)}",
            fix=AGAIN,
        )
    if args.get("type", "int") != "int":
        raise CheckpointError(
            f"{module.name}: packed codes of type {args.get('type')!r:.20} are not read; integers"
            " are",
            fix="quantise to integers, or to nvfp4-pack-quantized",
        )
    if args.get("symmetric") is False and "weight_zero_point" not in roles:
        raise CheckpointError(
            f"{module.name}: asymmetric, but there is no weight_zero_point", fix=AGAIN
        )
    integers = PackQuantized(
        shape=(rows, shape[1]),
        bits=bits,
        group=group_size(args, shape[1]),
        symmetric=args.get("symmetric", True) is not False,
    )
    wanted = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
    return module.stored(integers, wanted)
