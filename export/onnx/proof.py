"""Proving which initializer of an exported graph is which weight, and keeping it so.

The module is exported as a twin of unique random values, so an initializer's bytes say whose it
is. Then its values are taken away. What has no values cannot be folded, transposed or merged by
any later pass: a weight either stays itself, or its absence shows.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.errors import ExportError
from kilodelta.export.onnx.trace import Trace
from kilodelta.files.tying import first_names, untied
from kilodelta.models import experts, twin
from kilodelta.models.quiet import quiet

_FIX = "export with the versions in constraints.txt, or report the model's architecture"


def make_twin(module: nn.Module, dtype: torch.dtype, computed: Collection[str] = ()) -> nn.Module:
    """Copy a module into another precision, its weights unique random values.

    Attention is written out ("eager"): fused attention exports into guards against rows without
    any token, which keep TensorRT from recognising it. Tensors outside the state dict (rotary
    frequencies) keep float32.

    Args:
        module: the module.
        dtype: of the copy's floats.
        computed: state names of constants that no checkpoint holds; their values stay.
    """
    copied = copy.deepcopy(module)
    if hasattr(copied, "set_attn_implementation"):
        with quiet():  # parts that cannot change it are written out anyway
            copied.set_attn_implementation("eager")  # type: ignore[operator]
    experts.use(copied, experts.EXPORTED)
    cast(copied, dtype)
    state = {n: t for n, t in distinct(copied).items() if n not in computed}
    values = twin.unique({name: (tuple(t.shape), t.dtype) for name, t in state.items()})
    for name, tensor in state.items():
        tensor.copy_(values[name])
    return copied


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Bring the floating tensors of a module's state dict to `dtype`, in place; ties stay."""
    held = {id(tensor): tensor for tensor in module.state_dict(keep_vars=True).values()}
    for tensor in held.values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def distinct(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict, tied tensors once, under the name that comes first."""
    return untied(module.state_dict())


def claim(trace: Trace, module: nn.Module, computed: Collection[str] = ()) -> dict[str, list[Any]]:
    """Find the weights among a raw graph's initializers, and take their values away.

    Args:
        trace: of a twin.
        module: that twin.
        computed: state names of constants, which stay in the graph with their values.

    Returns:
        state name to `onnx_ir.Value`s, more than one where tied tensors were exported twice.

    Raises:
        ExportError: a weight that the outputs depend on is not there, or not in its layout.
    """
    state = {n: t for n, t in distinct(module).items() if n not in computed}
    by_content = {twin.content_of(tensor): name for name, tensor in state.items()}
    values_of: dict[str, list[Any]] = {}
    for value in trace.model.graph.initializers.values():
        name = by_content.get(twin.content(value.const_value.numpy()))
        if name is not None:
            values_of.setdefault(name, []).append(value)
    lost = _first_names(module, trace.used) - values_of.keys() - set(computed)
    _require_all(lost, trace, state)
    for values in values_of.values():
        for value in values:
            value.const_value = None
    return values_of


def require_kept(model: Any, weights: Mapping[str, list[Any]], used: Iterable[str]) -> None:
    """See that every weight the outputs depend on still feeds the graph.

    Raises:
        ExportError: naming those that do not.
    """
    feeding = {id(value) for value in model.graph.initializers.values() if value.uses()}
    lost = [n for n in used if n in weights and not any(id(v) in feeding for v in weights[n])]
    if lost:
        raise ExportError(f"simplifying the graph lost {', '.join(lost)}", fix=_FIX)


def _first_names(module: nn.Module, names: Iterable[str]) -> set[str]:
    """Return state names, tied ones by the name that comes first."""
    firsts = first_names(module.state_dict())
    return {firsts[name] for name in names if name in firsts}


def _require_all(lost: set[str], trace: Trace, state: Mapping[str, Tensor]) -> None:
    if not lost:
        return
    turned = {twin.content(twin.transposed(twin.bits(state[name]))): name for name in lost}
    prints = {twin.content(v.const_value.numpy()) for v in trace.model.graph.initializers.values()}
    transposed = {name for print_, name in turned.items() if print_ in prints}
    stated = [f"{n} ({'transposed' if n in transposed else 'folded'})" for n in sorted(lost)]
    raise ExportError(f"the exported graph does not hold {', '.join(stated)}", fix=_FIX)
