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
    found = []
    EXPRESSIONS.set(Expressions("the quantisation configuration", error=CheckpointError))
    for module, roles in _modules(source).items():
        _refuse_prepacked(module, roles)
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
        found.append(weight)
    return str(method), found


_PARTS = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2"),
    *("weight_global_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
    *("qweight", "qzeros"),
)
"""Tensors that belong to a quantised weight and to nothing else."""


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
