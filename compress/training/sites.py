"""Find a delta's targets in a module: which tensors, under which names, in which layers.

A target is a parameter; a site is a layer that computes with it. A tied parameter (the word
embedding that is also the output layer) has several names and several sites but is one target.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kilodelta.errors import InputError
from kilodelta.files import dtypes
from kilodelta.files.tensor import TensorInfo
from kilodelta.files.tying import file_order
from kilodelta.format.targets import Patterns, Target, matches, select
from kilodelta.models.layers import READ_FROM_OUTSIDE, is_stack, stores_in_out


@dataclass(frozen=True, kw_only=True, eq=False)
class Site:
    """One layer that computes with a target.

    Attributes:
        owner: the module that has the parameter.
        attribute: the parameter's name there.
        host: the module whose forward pass uses it: the owner, or, where the owner has no forward
            pass that does (a `ParameterList`, the output projection of `nn.MultiheadAttention`),
            the nearest module around it that has.
    """

    owner: nn.Module
    attribute: str
    host: nn.Module


@dataclass(frozen=True, kw_only=True, eq=False)
class AttachedTarget:
    """A target in a module: all its names (as checkpoints have them) and all its sites.

    The matrices of a stack are a target each, with the same names and sites.
    """

    target: Target
    aliases: tuple[str, ...]
    sites: tuple[Site, ...]

    @property
    def parameter(self) -> Tensor:
        """The target's weight; of a matrix of a stack, a view."""
        site = self.sites[0]
        weight: Tensor = site.owner._parameters[site.attribute]  # type: ignore[assignment]
        return weight if self.target.part is None else weight[self.target.part]


def by_parameter(places: Iterable[AttachedTarget]) -> list[list[AttachedTarget]]:
    """Group targets by the parameter that holds them: the matrices of a stack, in order."""
    found: dict[str, list[AttachedTarget]] = {}
    for place in places:
        found.setdefault(place.target.tensor, []).append(place)
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class _Use:
    """A parameter under one of its names."""

    name: str
    parameter: Tensor
    site: Site

    @property
    def held(self) -> tuple[nn.Module, str, tuple[int, ...]]:
        """The module that holds it, as what, and its shape."""
        return self.site.owner, self.site.attribute, tuple(self.parameter.shape)


def find(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], names: Mapping[str, str]
) -> tuple[Patterns, tuple[AttachedTarget, ...]]:
    """Choose the targets in a module by patterns.

    Args:
        model: the module.
        include: globs over checkpoint names.
        exclude: globs of what is no target after all.
        names: checkpoint name to state name, where they differ.

    Returns:
        The file's patterns, and the targets in file order.

    Raises:
        InputError: a pattern chooses nothing, or something that cannot be attached.
    """
    chosen = _choose(_uses(model, names), include, exclude)
    turned = [name for name, same in chosen.items() if _is_transposed(name, same)]
    stacks = [name for name, same in chosen.items() if _is_stack(same)]
    patterns = Patterns(
        include=tuple(include),
        exclude=tuple(exclude),
        transposed=globs_for(turned, [name for name in chosen if name not in turned]),
        stacked=globs_for(stacks, [name for name in chosen if name not in stacks]),
    )
    infos = [_info(name, same[0].parameter) for name, same in chosen.items()]
    places = tuple(_place(target, chosen[target.tensor]) for target in select(infos, patterns))
    return patterns, places


def checkpoint_names(model: nn.Module, names: Mapping[str, str]) -> Mapping[str, str]:
    """Map all state names to checkpoint names; those that files leave out come last."""
    stored = {state: name for name, state in names.items()}
    order = file_order(model, model.state_dict(keep_vars=True))
    order.sort(key=lambda name: name not in stored)
    return {name: stored.get(name, name) for name in order}


def _uses(model: nn.Module, names: Mapping[str, str]) -> list[_Use]:
    """List all parameters under all their names; the name that files keep comes first."""
    modules = dict(model.named_modules(remove_duplicate=False))
    uses = []
    for state_name, name in checkpoint_names(model, names).items():
        path, _, attribute = state_name.rpartition(".")
        parameter = modules[path]._parameters.get(attribute)
        if parameter is not None:
            site = Site(owner=modules[path], attribute=attribute, host=_host(modules, path))
            uses.append(_Use(name=name, parameter=parameter, site=site))
    return uses


def _host(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    while path and not _computes(modules[path]):
        path = path.rpartition(".")[0]
    return modules[path]


def _computes(module: nn.Module) -> bool:
    """Return whether a module's forward pass is what uses its parameters."""
    is_read = type(module).__name__ in READ_FROM_OUTSIDE
    has_forward = type(module).forward is not nn.Module.forward
    return has_forward and not is_read and not isinstance(module, NonDynamicallyQuantizableLinear)


def _choose(
    uses: Sequence[_Use], include: Sequence[str], exclude: Sequence[str]
) -> dict[str, list[_Use]]:
    """Choose matrices: by the first of its names that matches, each with all its uses."""
    matrices = [use for use in uses if _is_matrix(use.parameter)]
    for glob in include:
        if not any(matches(use.name, (glob,)) for use in matrices):
            raise _nothing(glob, [use.name for use in matrices])
    by_identity: dict[int, list[_Use]] = {}
    for use in matrices:
        by_identity.setdefault(id(use.parameter), []).append(use)
    chosen = {}
    for same in by_identity.values():
        hits = [u.name for u in same if matches(u.name, include) and not matches(u.name, exclude)]
        if hits:
            chosen[hits[0]] = same
    if not chosen:
        raise InputError(
            f"everything that {list(include)} chooses is excluded",
            fix="leave a glob of `exclude` out",
        )
    return chosen


def _is_matrix(parameter: Tensor) -> bool:
    dtype = dtypes.BY_LONG.get(str(parameter.dtype).removeprefix("torch."))
    return (
        dtype is not None
        and dtype.name in dtypes.TARGETS
        and parameter.ndim >= 2
        and parameter.numel() > 0
    )


def _nothing(glob: str, names: Sequence[str]) -> InputError:
    near = get_close_matches(glob, names, n=3, cutoff=0.3) or list(names[:3])
    return InputError(
        f"no float matrix of the model matches {glob!r}",
        fix=f"patterns match whole names, such as {', '.join(near) or 'nothing: it has none'}",
    )


def _info(name: str, parameter: Tensor) -> TensorInfo:
    dtype = dtypes.BY_LONG[str(parameter.dtype).removeprefix("torch.")].name
    shape = tuple(parameter.shape)
    return TensorInfo(name=name, dtype=dtype, shape=shape)


def _place(target: Target, same: Sequence[_Use]) -> AttachedTarget:
    sites = {(id(use.site.owner), use.site.attribute): use.site for use in same}
    return AttachedTarget(
        target=target,
        aliases=tuple(dict.fromkeys((target.tensor, *(use.name for use in same)))),
        sites=tuple(sites.values()),
    )


def _is_stack(same: Sequence[_Use]) -> bool:
    return any(is_stack(*use.held) for use in same)


def _is_transposed(name: str, same: Sequence[_Use]) -> bool:
    kinds = {stores_in_out(*use.held) for use in same}
    if len(kinds) == 2:
        raise InputError(
            f"{name} is the weight of a Conv1D and, tied, of a layer that stores it the other way",
            fix="exclude it, or untie the layers",
        )
    return kinds.pop()


def globs_for(wanted: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Make few globs that match all of the wanted names and none of the others.

    Example:
        >>> globs_for(["h.0.w", "h.1.w"], ["h.0.b"])
        ('h.*.w',)
    """
    rest = tuple(others)
    names = tuple(wanted)
    if names and not rest:
        return ("*",)
    short = dict.fromkeys(_digits_to_stars(name) for name in names)
    if not any(matches(name, short) for name in rest):
        return tuple(short)
    return tuple(_literal(name) for name in names)


def _digits_to_stars(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", _literal(name))


def _literal(name: str) -> str:
    """Return a glob that matches just this name."""
    return re.sub(r"([*?[])", r"[\1]", name)
