"""Look at the tensors of one module and at the configuration: what all readers share."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from kilodelta.errors import CheckpointError
from kilodelta.expressions import Expressions
from kilodelta.files.tensor import TensorInfo
from kilodelta.grid.matrix import Shape
from kilodelta.grid.model import Source, Stored

Config = Mapping[str, Any]
Roles = Mapping[str, TensorInfo]
"""The tensors of one module by the last part of their names."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """What a reader looks at: one module of a quantised checkpoint.

    Attributes:
        name: the module's; "" for the root.
        roles: its tensors.
        config: the quantisation configuration.
        source: what the tensors are read from.
    """

    name: str
    roles: Roles
    config: Config
    source: Source

    def stored(self, layout: Any, wanted: tuple[str, ...]) -> Stored:
        """Describe its weight; roles that the layout needs and the file lacks show when it is read.

        Args:
            layout: an entry of `kilodelta.grid.layouts`.
            wanted: the roles that the layout reads.
        """
        named = {role: self.roles[role].name for role in wanted if role in self.roles}
        name = f"{self.name}.weight" if self.name else "weight"
        return Stored(name=name, layout=layout, parts=named)


EXPRESSIONS: ContextVar[Expressions] = ContextVar("expressions")
"""Of the model that is being recognised: all its modules share one budget of time."""
CONVERT = "convert it back with the tool that wrote it, or fetch the model in a portable layout"
AGAIN = "the checkpoint is incomplete or its configuration is of another one: fetch it again"


def bound_to_kernel(name: str, how: str) -> CheckpointError:
    return CheckpointError(f"{name} is {how}, and such a layout is not read", fix=CONVERT)


def matrix_shape(info: TensorInfo) -> Shape:
    if len(info.shape) != 2:
        raise CheckpointError(
            f"{info.name} has shape {list(info.shape)}: only matrices are read, no stacked experts",
            fix="give a model whose experts are stored one by one",
        )
    return info.shape[0], info.shape[1]


def group_size(config: Config, columns: int) -> int:
    """Read `group_size`, of which -1 (or none) stands for all columns."""
    group = config.get("group_size", config.get("q_group_size"))
    return group if isinstance(group, int) and group > 0 else max(columns, 1)


def config_groups(config: Config) -> list[dict[str, Any]]:
    groups = config.get("config_groups")
    return [g for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []


def refuse_swizzled(scale: TensorInfo | None, plain: Shape) -> None:
    """Recognise scales in the 128 x 4 tiles that NVFP4's kernels take, where padding tells."""
    tiled = (-(-plain[0] // 128) * 128, -(-plain[1] // 4) * 4)
    if scale is not None and scale.shape != plain and scale.shape == tiled:
        raise bound_to_kernel(scale.name, "swizzled into tiles of 128 x 4 scales")


def weight_args(module: str, config: Config, kind: str, bits: int = 0) -> Mapping[str, Any]:
    """Return the `weights` of the group of `config_groups` that a module belongs to.

    A module's stored types say of which kind its group is. A group names modules, by name or
    expression, or else classes, such as `Linear`.

    Args:
        module: its name.
        config: the quantisation configuration.
        kind: of its codes, `int` or `float`; groups of the other count where there are no others.
        bits: of its codes, where the stored types say that as well.

    Raises:
        CheckpointError: several groups may be meant, and they differ.
    """
    groups = config_groups(config)
    refuse_marlin(module, config)
    fit = [g for g in groups if _is_of(g.get("weights"), kind, bits)] or groups
    named = [g for g in fit if any(_names(target, module) for target in _targets(g))]
    classes = [g for g in fit if any(str(target)[:1].isupper() for target in _targets(g))]
    chosen = named or classes or fit
    distinct = {str(g.get("weights")) for g in chosen}
    if len(distinct) != 1 or not isinstance(chosen[0].get("weights"), dict):
        raise CheckpointError(
            f"{module}: config_groups do not say with which of {len(groups)} schemes it was"
            " quantised",
            fix="name the modules in the targets of config_groups, by name or re:",
        )
    found: Mapping[str, Any] = chosen[0]["weights"]
    return found


def refuse_marlin(module: str, config: Config) -> None:
    for name in (config.get("format"), *(group.get("format") for group in config_groups(config))):
        if "marlin" in str(name):
            raise bound_to_kernel(module, f"in the layout {name}")


def _is_of(weights: Any, kind: str, bits: int) -> bool:
    if not isinstance(weights, dict) or weights.get("type", "int") != kind:
        return False
    return not bits or weights.get("num_bits", bits) == bits


def _targets(group: dict[str, Any]) -> list[Any]:
    targets = group.get("targets")
    return targets if isinstance(targets, list) else []


def _names(target: Any, module: str) -> bool:
    if not isinstance(target, str):
        return False
    if not target.startswith("re:"):
        return target == module
    return EXPRESSIONS.get().begins(target[3:], target, module)
