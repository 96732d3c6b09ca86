"""Recognise weights of GPTQ and AWQ."""

from __future__ import annotations

from kilodelta.errors import CheckpointError
from kilodelta.grid.layouts.gptq import V1, Awq, Gptq
from kilodelta.grid.model import Stored
from kilodelta.grid.readers.common import (
    Module,
    bound_to_kernel,
    group_size,
    matrix_shape,
)


def read_gptq(module: Module) -> Stored | None:
    """Find a weight in the layout of GPTQ, versions 1 and 2; None where there is none.

    Raises:
        CheckpointError: the layout is recognised and not read, or a part is missing.
    """
    roles, config = module.roles, module.config
    if "qweight" not in roles:
        return None
    form = config.get("checkpoint_format", "gptq")
    if config.get("is_marlin_format") or form not in ("gptq", "gptq_v2"):
        raise bound_to_kernel(roles["qweight"].name, f"in the layout {form!r:.40} of one kernel")
    if config.get("dynamic"):
        raise CheckpointError(
            f"{module.name}: `dynamic` gives modules other bits, which is not read",
            fix="quantise all modules alike",
        )
    bits = config.get("bits")
    if type(bits) is not int or bits not in V1:
        raise CheckpointError(
            f"{module.name}: GPTQ of {bits!r:.20} bits is not read; 2, 4 and 8 are",
            fix="quantise to 4 or 8 bits",
        )
    words, rows = matrix_shape(roles["qweight"])
    if rows * bits % 32:
        raise CheckpointError(
            f"{module.name}: {rows} rows are no multiple of {32 // bits}, which zero points of"
            f" {bits} bits are packed by",
            fix="quantise to compressed-tensors' pack-quantized, or leave this module out",
        )
    columns = words * 32 // bits
    layout = Gptq(
        shape=(rows, columns), bits=bits, group=group_size(config, columns), v1=form == "gptq"
    )
    return module.stored(layout, ("qweight", "qzeros", "scales", "g_idx"))


def read_awq(module: Module) -> Stored | None:
    """Find a weight in the GEMM layout of AWQ; None where there is none.

    Raises:
        CheckpointError: the layout is recognised and not read, or a part is missing.
    """
    roles, config = module.roles, module.config
    if "qweight" not in roles:
        return None
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if version != "gemm":
        raise bound_to_kernel(
            roles["qweight"].name, f"in AWQ's layout {version!r:.40} of one kernel"
        )
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise CheckpointError(
            f"{module.name}: AWQ of {bits!r:.20} bits is not read; 4 are", fix="quantise to 4 bits"
        )
    columns, words = matrix_shape(roles["qweight"])
    layout = Awq(shape=(words * 8, columns), group=group_size(config, columns))
    return module.stored(layout, ("qweight", "qzeros", "scales"))
