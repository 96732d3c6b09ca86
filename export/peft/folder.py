"""Write the files of a PEFT LoRA adapter: keys, shapes and settings.

alpha equals r everywhere, and by default all targets have one rank: PEFT, vLLM and llama.cpp
disagree on what a rank pattern does to the scale, and so there is nothing to disagree about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.export.peft.factors import FactorPair, padded
from kilodelta.export.peft.modules import (
    ModuleKind,
    ModuleNaming,
    StackedParameter,
    StoredModules,
    sort_extras,
)
from kilodelta.files import safetensors, staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.models.layer_names import owner


@dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """Where everything goes: the targets' modules and kinds by tensor name, and the extras.

    Attributes:
        paths: the module of each target.
        kinds: what PEFT takes that module for.
        targets: the delta's, by name.
        whole: where the extras go.
        modules: all modules of the base that own a tensor, adapted or not.
        stacks: tensors that hold the matrices of several experts, by name.
    """

    paths: Mapping[str, str]
    kinds: Mapping[str, ModuleKind]
    targets: Mapping[str, Target]
    whole: StoredModules
    modules: Sequence[str]
    stacks: Mapping[str, StackedParameter] = field(default_factory=dict)


def make_plan(delta: Delta, checkpoint: Checkpoint, naming: ModuleNaming) -> AdapterPlan:
    """Decide where each target and extra of a delta goes in an adapter.

    Raises:
        ExportError: PEFT has no place for one; it is named.
    """
    kinds = {name: naming.kind(target) for name, target in delta.targets.items()}
    for name, kind in kinds.items():
        if kind is ModuleKind.EMBEDDING:
            naming.check_untied(name, checkpoint)
    return AdapterPlan(
        paths={name: naming.path(name) for name in kinds},
        kinds=kinds,
        targets=delta.targets,
        whole=sort_extras(list(delta.extras), list(kinds), checkpoint, naming),
        modules=sorted({naming.path(name) for name in checkpoint.names if owner(name)}),
        stacks={
            name: naming.stack(name)
            for name, parts in delta.tensors.items()
            if parts[0].part is not None
        },
    )


def adapter_tensors(
    plan: AdapterPlan, pairs: Mapping[str, FactorPair], dtype: str, *, own_ranks: bool
) -> tuple[dict[str, RawTensor], dict[str, int]]:
    """Lay out the adapter's factors by key, and return the rank of each module.

    Args:
        plan: where everything goes.
        pairs: the factors, by target.
        dtype: that they are rounded to: F32, F16 or BF16.
        own_ranks: keep each target's rank; else all are padded with zeros to the highest.

    Returns:
        The tensors by key, and the rank by module path.
    """
    top = max(1, *(pair.rank for pair in pairs.values()))
    tensors: dict[str, RawTensor] = {}
    ranks = {}
    for name in plan.stacks:
        tensors |= _keyed_stack(plan, name, pairs, top, dtype)
    for name, pair in pairs.items():
        if plan.kinds[name] is ModuleKind.STACK:
            continue
        rank = max(1, pair.rank) if own_ranks else top
        ranks[plan.paths[name]] = rank
        tensors |= _keyed(plan, name, padded(pair, rank), dtype)
    return tensors, ranks


def _keyed(plan: AdapterPlan, name: str, pair: FactorPair, dtype: str) -> dict[str, RawTensor]:
    """Name and shape one target's two tensors as its kind of layer has them."""
    kind, target, start = (
        plan.kinds[name],
        plan.targets[name],
        f"base_model.model.{plan.paths[name]}",
    )
    A, B = pair.A, pair.B
    # Factors are (out, r) and (r, in) of the update; PEFT wants those of what its layer computes.
    if (kind in (ModuleKind.CONV1D, ModuleKind.EMBEDDING)) != target.transposed:
        A, B = B.T, A.T
    if kind is ModuleKind.CONV:
        A = A.reshape(pair.rank, *target.shape[1:])
        B = B.reshape(*B.shape, *(1 for _ in target.shape[2:]))
    if kind is ModuleKind.EMBEDDING:
        keys = f"{start}.lora_embedding_A", f"{start}.lora_embedding_B"
    else:
        keys = f"{start}.lora_A.weight", f"{start}.lora_B.weight"
    return {key: _raw(dtype, values) for key, values in zip(keys, (A, B), strict=True)}


def _keyed_stack(
    plan: AdapterPlan, name: str, pairs: Mapping[str, FactorPair], rank: int, dtype: str
) -> dict[str, RawTensor]:
    """Name and shape the factors of all experts of one tensor as PEFT's `ParamWrapper` has them.

    `lora_A` (experts * r, in) is by expert, then rank; `lora_B` (out, r * experts) by rank, then
    expert. PEFT wraps a module once for every parameter, in the order in which it holds them, so
    the first one's wrapper lies innermost.
    """
    place = plan.stacks[name]
    targets = [target for target in plan.targets.values() if target.tensor == name]
    factors = [padded(pairs[target.name], rank) for target in targets]
    A, B = [f.A for f in factors], [f.B for f in factors]
    if targets[0].transposed != place.in_out:
        A, B = [b.T for b in B], [a.T for a in A]
    outer = [s for s in plan.stacks.values() if s.path == place.path and s.order > place.order]
    start = ".".join(("base_model.model", place.path, *("base_layer" for _ in outer)))
    return {
        f"{start}.lora_A.weight": _raw(dtype, np.concatenate(A)),
        f"{start}.lora_B.weight": _raw(dtype, np.stack(B, axis=2).reshape(len(B[0]), -1)),
    }


def _raw(dtype: str, values: Any) -> RawTensor:
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return RawTensor(dtype=dtype, shape=values.shape, data=data)


def stored_tensors(
    whole: StoredModules, delta: Delta, checkpoint: Checkpoint
) -> dict[str, RawTensor]:
    """Collect the tensors of whole modules by key: the delta's, and the base's beside them."""
    tensors = {}
    for name, key in whole.tensors.items():
        if name in delta.extras:
            tensors[key] = delta.extras[name]
        else:
            tensors[key] = checkpoint.raw(name)
    return tensors


def adapter_config(
    plan: AdapterPlan, ranks: Mapping[str, int], rank: int, base: str
) -> dict[str, Any]:
    """Return the contents of `adapter_config.json`.

    Args:
        plan: where everything goes.
        ranks: of each module, by path.
        rank: the highest of them, and that of stacked experts.
        base: the base's name, or nothing.
    """
    parameters = sorted(f"{one.path}.{one.attribute}" for one in plan.stacks.values())
    own = {f"^{re.escape(path)}": r for path, r in sorted(ranks.items()) if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": own,
        "alpha_pattern": own,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(sorted(ranks), plan.modules),
        **({"target_parameters": parameters} if parameters else {}),
        "fan_in_fan_out": ModuleKind.CONV1D in plan.kinds.values(),
        "modules_to_save": list(plan.whole.modules) or None,
        "bias": "lora_only" if plan.whole.biases else "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _target_modules(paths: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """Return the exact paths, or one expression where a path also ends another module's.

    PEFT matches a list by endings, and would adapt that other module as well.
    """
    endings = tuple("." + path for path in paths)
    if any(module.endswith(endings) and module not in set(paths) for module in modules):
        return "|".join(re.escape(path) for path in paths)
    return list(paths)


def write_folder(out: Path, config: Mapping[str, Any], tensors: Mapping[str, RawTensor]) -> int:
    """Write an adapter's two files, in full or not at all; return the bytes of the weights.

    Raises:
        OutputError: `out` exists, or cannot be written.
    """
    with staging.new_folder(out) as stage:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (stage / "adapter_config.json").write_text(text, encoding="utf-8")
        place = stage / "adapter_model.safetensors"
        return safetensors.write(place, tensors, {"format": "pt"})
