"""Recognise the layout of each weight from a checkpoint's configuration and its tensors.

The tensors decide where the two disagree: ModelOpt calls plain INT4 `W4A16_AWQ`, for example.
What is laid out for one kernel (Marlin, swizzled scales, AWQ's GEMV) is refused by name.
"""

from __future__ import annotations

from kilodelta.errors import CheckpointError
from kilodelta.expressions import Expressions
from kilodelta.files.tensor import TensorInfo
from kilodelta.grid.model import Source, Stored
from kilodelta.grid.readers import READERS
from kilodelta.grid.readers.common import AGAIN, EXPRESSIONS, Config, Module, Roles, bound_to_kernel


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
        what = (
            "no quant_method" if method is None else f"quant_method {method!r:.80}, not read here"
        )
        raise CheckpointError(
            f"the quantisation configuration states {what}; these are read: {', '.join(READERS)}",
            fix="give the model before quantisation, or quantised by one of them",
        )
    _refuse_rotated(config)
    found = []
    EXPRESSIONS.set(Expressions("the quantisation configuration", error=CheckpointError))
    for module, roles in _modules(source).items():
        _refuse_prepacked(module, roles)
        _refuse_stacks(module, roles)
        weight = reader(Module(name=module, roles=roles, config=config, source=source))
        if weight is None:
            _refuse_left_parts(module, roles, str(method))
            continue
        if "weight" in roles and roles["weight"].name not in weight.parts.values():
            raise CheckpointError(
                f"{roles['weight'].name} is stored twice: as {roles['weight'].dtype}, and quantised"
                f" as {weight.codes}",
                fix=AGAIN,
            )
        _refuse_unread_parts(weight, roles, source)
        found.append(weight)
    return str(method), found


_PARTS = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2"),
    *("weight_global_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
    *("qweight", "qzeros"),
)
"""Tensors that belong to a quantised weight and to nothing else."""
_ENDS = (
    *("_weight_scale_inv", "_weight_scale_2", "_weight_scale", "_scale_inv", "_scale_2"),
    *("_scale", "_scales", "_zero_point"),
)
"""What is appended to the name of a tensor of codes that is not called `weight`."""
_CODES = ("U8", "I8", "I32", "F8_E4M3", "F8_E5M2", "F4")
"""Types that codes are stored in."""


def _refuse_unread_parts(weight: Stored, roles: Roles, source: Source) -> None:
    """Refuse a weight with a part that its layout does not read: it has other values then.

    Zero points of zero change none, and some writers store them.
    """
    read = set(weight.parts.values())
    for role in (*_PARTS, "scales", "g_idx"):
        if role not in roles or roles[role].name in read:
            continue
        name = roles[role].name
        if role == "weight_zero_point" and not source.raw(name).data.any():
            continue
        raise CheckpointError(
            f"{name} belongs to a weight in the layout {weight.layout.name}, which has no"
            f" {role}: so its values are not known",
            fix="quantise to a layout of docs/quantised.md",
        )


def _refuse_stacks(module: str, roles: Roles) -> None:
    """Refuse codes that are a parameter of a module of their own, as experts are stacked."""
    for role, info in roles.items():
        stem = next((role.removesuffix(end) for end in _ENDS if role.endswith(end)), "weight")
        if stem != "weight" and stem in roles and roles[stem].dtype in _CODES:
            codes = roles[stem]
            raise CheckpointError(
                f"{codes.name} is {codes.dtype} {list(codes.shape)} with {info.name}: stacked"
                " experts are not read",
                fix="give a model whose experts are stored one by one",
            )


def _refuse_left_parts(module: str, roles: Roles, method: str) -> None:
    """Refuse scales without codes: as plain tensors they would be targets of an update."""
    left = [role for role in _PARTS if role in roles]
    if not left:
        return
    stored = next((roles[name] for name in ("weight", "qweight") if name in roles), None)
    what = "no codes" if stored is None else f"{stored.dtype} {list(stored.shape)} for codes"
    raise CheckpointError(
        f"{module or 'the root'} has {', '.join(left)} and {what}: no weight that {method} stores"
        " and that is read here",
        fix="fetch the checkpoint again, all shards; if it is whole, quantise to a layout of"
        " docs/quantised.md",
    )


def _refuse_rotated(config: Config) -> None:
    """Refuse a model whose weights are products with rotations, some of them applied at run time.

    Sources: compressed-tensors' `transform_config` (QuIP, SpinQuant), GPTQModel's `rotation`.
    """
    transforms = config.get("transform_config")
    groups = transforms.get("config_groups", transforms) if isinstance(transforms, dict) else None
    for key, given in (("transform_config", groups), ("rotation", config.get("rotation"))):
        if given:
            raise CheckpointError(
                f"the quantisation configuration states {key}: weights were rotated before they"
                " were quantised, so they are not those of the float model",
                fix="quantise without rotations",
            )


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
                raise bound_to_kernel(f"{module}.{role}", f"{word} for one kernel")
    if {"B", "s", "workspace"} <= set(roles):
        raise bound_to_kernel(f"{module}.B", "in Marlin's layout")
