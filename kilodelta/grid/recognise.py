"""Recognise the layout of each weight from a checkpoint's configuration and its tensors.

The tensors decide where the two disagree: ModelOpt calls plain INT4 `W4A16_AWQ`, for example.
What is laid out for one kernel (Marlin, swizzled scales, AWQ's GEMV) is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from kilodelta.errors import CheckpointError
from kilodelta.expressions import Expressions
from kilodelta.files.tensor import TensorInfo
from kilodelta.grid.layouts.compressed_tensors import Nvfp4Packed, PackQuantized
from kilodelta.grid.layouts.fp8 import Fp8
from kilodelta.grid.layouts.gptq import V1, Awq, Gptq
from kilodelta.grid.layouts.modelopt import ModelOptInt4, ModelOptNvfp4
from kilodelta.grid.matrix import Shape
from kilodelta.grid.model import Source, Stored

Config = Mapping[str, Any]
Roles = Mapping[str, TensorInfo]
"""The tensors of one module by the last part of their names."""

_EXPRESSIONS: ContextVar[Expressions] = ContextVar("expressions")
"""Of the model that is being recognised: all its modules share one budget of time."""
_CONVERT = "convert it back with the tool that wrote it, or fetch the model in a portable layout"
_AGAIN = "the checkpoint is incomplete or its configuration is of another one: fetch it again"


def weights(config: Config, source: Source) -> tuple[str, list[Stored]]:
    """Recognise all quantised weights.

    Args:
        config: the quantisation configuration.
        source: the stored tensors.

    Returns:
        the method's name, and the weights.

    Raises:
        CheckpointError: the method or a layout is unknown or bound to one kernel; says which.
    """
    method = config.get("quant_method")
    reader = READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise CheckpointError(
            f"quant_method {method!r:.80} is not read; these are: {', '.join(READERS)}",
            fix="give the model before quantisation, or quantised by one of them",
        )
    found = []
    _EXPRESSIONS.set(Expressions("the quantisation configuration", error=CheckpointError))
    for module, roles in _modules(source).items():
        _refuse_prepacked(module, roles)
        weight = reader(module, roles, config, source)
        if weight is not None:
            found.append(weight)
    return str(method), found


def _modules(source: Source) -> dict[str, dict[str, TensorInfo]]:
    found: dict[str, dict[str, TensorInfo]] = {}
    for name in source.names:
        module, _, role = name.rpartition(".")
        found.setdefault(module, {})[role] = source.info(name)
    return found


def _refuse_prepacked(module: str, roles: Roles) -> None:
    for role in roles:
        low = role.lower()
        for word in ("marlin", "swizzled", "interleaved", "prepacked"):
            if word in low:
                raise _bound(f"{module}.{role}", f"{word} for one kernel")
    if {"B", "s", "workspace"} <= set(roles):
        raise _bound(f"{module}.B", "in Marlin's layout")


def _bound(name: str, how: str) -> CheckpointError:
    return CheckpointError(f"{name} is {how}, and such a layout is not read", fix=_CONVERT)


def _stored(module: str, layout: Any, roles: Roles, wanted: tuple[str, ...]) -> Stored:
    """Describe a weight; roles that the layout needs and the file lacks are found when read."""
    named = {role: roles[role].name for role in wanted if role in roles}
    return Stored(name=f"{module}.weight" if module else "weight", layout=layout, parts=named)


def _matrix_shape(info: TensorInfo) -> Shape:
    if len(info.shape) != 2:
        raise CheckpointError(
            f"{info.name} has shape {list(info.shape)}: only matrices are read, no stacked experts",
            fix="give a model whose experts are stored one by one",
        )
    return info.shape[0], info.shape[1]


# --- compressed-tensors -------------------------------------------------------------------------


def _compressed_tensors(module: str, roles: Roles, config: Config, source: Source) -> Stored | None:
    if "weight_packed" not in roles:
        return _fp8(module, roles, config, source)
    packed = roles["weight_packed"]
    rows, width = _matrix_shape(packed)
    args = _weight_args(module, config)
    if packed.dtype == "U8":
        scale = roles.get("weight_scale")
        if "weight_global_scale" not in roles and scale is not None and scale.dtype == "U8":
            raise CheckpointError(
                f"{packed.name}: mxfp4-pack-quantized is not read",
                fix="quantise to nvfp4-pack-quantized or pack-quantized",
            )
        _refuse_swizzled(scale, (rows, -(-2 * width // Nvfp4Packed.GROUP)))
        layout = Nvfp4Packed(shape=(rows, 2 * width))
        return _stored(
            module, layout, roles, ("weight_packed", "weight_scale", "weight_global_scale")
        )
    if "weight_shape" not in roles:
        raise CheckpointError(f"{module}: weight_packed has no weight_shape", fix=_AGAIN)
    shape = tuple(map(int, source.raw(roles["weight_shape"].name).values().reshape(-1)))
    bits = args.get("num_bits")
    if len(shape) != 2 or shape[0] != rows or type(bits) is not int or not 1 <= bits <= 8:
        raise CheckpointError(
            f"{module}: weight_shape {list(shape)} and num_bits {bits!r:.20} do not fit"
            f" weight_packed {list(packed.shape)}",
            fix=_AGAIN,
        )
    if args.get("symmetric") is False and "weight_zero_point" not in roles:
        raise CheckpointError(
            f"{module}: asymmetric, but there is no weight_zero_point", fix=_AGAIN
        )
    integers = PackQuantized(shape=(rows, shape[1]), bits=bits, group=_group(args, shape[1]))
    wanted = ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
    return _stored(module, integers, roles, wanted)


def _weight_args(module: str, config: Config) -> Mapping[str, Any]:
    """Return the `weights` of the group of `config_groups` that a module belongs to."""
    groups = _groups(config)
    for name in (config.get("format"), *(group.get("format") for group in groups)):
        if "marlin" in str(name):
            raise _bound(module, f"in the layout {name}")
    named = [g for g in groups if any(_names(target, module) for target in _targets(g))]
    classes = [g for g in groups if any("." not in str(target) for target in _targets(g))]
    chosen = named or (classes if len(classes) == 1 else groups)
    distinct = {str(g.get("weights")) for g in chosen}
    if len(distinct) != 1 or not isinstance(chosen[0].get("weights"), dict):
        raise CheckpointError(
            f"{module}: config_groups do not say with which of {len(groups)} schemes it was"
            " quantised",
            fix="name the modules in the targets of config_groups, by name or re:",
        )
    found: Mapping[str, Any] = chosen[0]["weights"]
    return found


def _groups(config: Config) -> list[dict[str, Any]]:
    groups = config.get("config_groups")
    return [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []


def _targets(group: dict[str, Any]) -> list[Any]:
    targets = group.get("targets")
    return targets if isinstance(targets, list) else []


def _names(target: Any, module: str) -> bool:
    if not isinstance(target, str):
        return False
    if not target.startswith("re:"):
        return target == module
    return _EXPRESSIONS.get().begins(target[3:], target, module)


def _refuse_swizzled(scale: TensorInfo | None, plain: Shape) -> None:
    """Recognise scales in the 128 x 4 tiles that NVFP4's kernels take, where padding tells."""
    tiled = (-(-plain[0] // 128) * 128, -(-plain[1] // 4) * 4)
    if scale is not None and scale.shape != plain and scale.shape == tiled:
        raise _bound(scale.name, "swizzled into tiles of 128 x 4 scales")


# --- FP8 and ModelOpt ---------------------------------------------------------------------------


def _fp8(module: str, roles: Roles, config: Config, source: Source) -> Stored | None:
    weight = roles.get("weight")
    if weight is None or weight.dtype != "F8_E4M3":
        return None
    shape = _matrix_shape(weight)
    scale = next((r for r in ("weight_scale_inv", "weight_scale") if r in roles), None)
    if scale is None:
        raise CheckpointError(
            f"{weight.name} is F8_E4M3 without weight_scale or weight_scale_inv", fix=_AGAIN
        )
    if roles[scale].dtype == "F8_E8M0":
        raise CheckpointError(
            f"{roles[scale].name} is F8_E8M0, and such scales are not read",
            fix="give the model with float32 scales",
        )
    block = _fp8_block(shape, roles[scale].shape, config)
    return _stored(module, Fp8(shape=shape, scale=scale, block=block), roles, ("weight", scale))


def _fp8_block(shape: Shape, scales: tuple[int, ...], config: Config) -> Shape:
    size = config.get("weight_block_size")
    if size is None:
        args = [g["weights"] for g in _groups(config) if isinstance(g.get("weights"), dict)]
        size = next((a["block_structure"] for a in args if a.get("block_structure")), None)
    if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    if scales in ((shape[0], 1), (shape[0],)) and shape[0] > 1:
        return 1, shape[1]
    return max(shape[0], 1), max(shape[1], 1)


def _modelopt(module: str, roles: Roles, config: Config, source: Source) -> Stored | None:
    weight = roles.get("weight")
    if "pre_quant_scale" in roles:
        raise CheckpointError(
            f"{roles['pre_quant_scale'].name}: AWQ scaled the columns of this weight and folded the"
            " inverse into other layers' norms, so an update of the float model fits neither",
            fix="quantise without AWQ (INT4 round to nearest, FP8 or NVFP4)",
        )
    if weight is None or weight.dtype != "U8":
        return _fp8(module, roles, config, source)
    rows, width = _matrix_shape(weight)
    if "weight_scale_2" in roles and roles.get("weight_scale", weight).dtype == "F8_E4M3":
        _refuse_swizzled(roles["weight_scale"], (rows, -(-2 * width // ModelOptNvfp4.GROUP)))
        wanted = ("weight", "weight_scale", "weight_scale_2")
        return _stored(module, ModelOptNvfp4(shape=(rows, 2 * width)), roles, wanted)
    scale = roles.get("weight_scale")
    if scale is None or len(scale.shape) != 2 or not scale.shape[1]:
        raise CheckpointError(f"{weight.name} is U8 without weight_scale per group", fix=_AGAIN)
    layout = ModelOptInt4(shape=(2 * rows, width), group=-(-width // scale.shape[1]))
    return _stored(module, layout, roles, ("weight", "weight_scale"))


# --- GPTQ and AWQ -------------------------------------------------------------------------------


def _gptq(module: str, roles: Roles, config: Config, source: Source) -> Stored | None:
    if "qweight" not in roles:
        return None
    form = config.get("checkpoint_format", "gptq")
    if config.get("is_marlin_format") or form not in ("gptq", "gptq_v2"):
        raise _bound(roles["qweight"].name, f"in the layout {form!r:.40} of one kernel")
    if config.get("dynamic"):
        raise CheckpointError(
            f"{module}: `dynamic` gives modules other bits, which is not read",
            fix="quantise all modules alike",
        )
    bits = config.get("bits")
    if type(bits) is not int or bits not in V1:
        raise CheckpointError(
            f"{module}: GPTQ of {bits!r:.20} bits is not read; 2, 4 and 8 are",
            fix="quantise to 4 or 8 bits",
        )
    words, rows = _matrix_shape(roles["qweight"])
    columns = words * 32 // bits
    layout = Gptq(
        shape=(rows, columns), bits=bits, group=_group(config, columns), v1=form == "gptq"
    )
    return _stored(module, layout, roles, ("qweight", "qzeros", "scales", "g_idx"))


def _awq(module: str, roles: Roles, config: Config, source: Source) -> Stored | None:
    if "qweight" not in roles:
        return None
    version = str(config.get("version", config.get("format", "gemm"))).lower()
    if version != "gemm":
        raise _bound(roles["qweight"].name, f"in AWQ's layout {version!r:.40} of one kernel")
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise CheckpointError(
            f"{module}: AWQ of {bits!r:.20} bits is not read; 4 are", fix="quantise to 4 bits"
        )
    columns, words = _matrix_shape(roles["qweight"])
    layout = Awq(shape=(words * 8, columns), group=_group(config, columns))
    return _stored(module, layout, roles, ("qweight", "qzeros", "scales"))


def _group(config: Config, columns: int) -> int:
    """Read `group_size`, of which -1 (or none) stands for all columns."""
    group = config.get("group_size", config.get("q_group_size"))
    return group if isinstance(group, int) and group > 0 else max(columns, 1)


Reader = Callable[[str, Roles, Config, Source], "Stored | None"]
READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "compressed-tensors": _compressed_tensors,
        "modelopt": _modelopt,
        "fp8": _fp8,
        "gptq": _gptq,
        "awq": _awq,
    }
)
"""By `quant_method`: from a module's tensors to its quantised weight, None where it has none."""
