"""Which tensors of the base an adapter changes: its modules, found in the model that it is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kilodelta.compress.adapters.architecture import AdaptedArchitecture, ExpertStack
from kilodelta.compress.adapters.peft.config import AdapterConfig
from kilodelta.compress.adapters.peft.keys import Module
from kilodelta.compress.adapters.peft.parameters import missing_parameters, targeted_parameters
from kilodelta.compress.adapters.peft.targeting import (
    is_targeted,
    missing_targets,
    require_targeted,
)
from kilodelta.compress.adapters.placing import Place, find_place
from kilodelta.compress.adapters.tensors import AdapterTensors
from kilodelta.errors import BaseMismatchError, InputError
from kilodelta.files import dtypes


@dataclass(frozen=True, kw_only=True)
class AdapterSite:
    """One tensor of the model that an adapter changes.

    Attributes:
        module: the adapted module's path and the keys of its parts.
        name: the tensor's name in the model.
        tensor: the base's tensor; empty where the base has a matrix for every expert.
        stack: those matrices.
        is_parameter: whether `target_parameters` chose it.
    """

    module: Module
    name: str
    tensor: str = ""
    stack: ExpertStack | None = None
    is_parameter: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The base's tensors: one, or a matrix for every expert."""
        if self.stack is None:
            return (self.tensor,)
        return tuple(name for part in self.stack.parts for name in part)

    @property
    def pattern_path(self) -> str:
        """The path that `rank_pattern` and `alpha_pattern` are matched with."""
        leaf = self.name.rpartition(".")[2]
        return f"{self.module.path}.{leaf}" if self.is_parameter else self.module.owner


def find_sites(
    path: Path,
    modules: Sequence[Module],
    architecture: AdaptedArchitecture,
    config: AdapterConfig,
    tensors: AdapterTensors,
    *,
    prefix: str = "",
) -> tuple[Place, tuple[AdapterSite, ...]]:
    """Find the tensors of the base that an adapter changes.

    Args:
        path: the adapter, for errors.
        modules: its modules and their keys.
        architecture: the base.
        config: the adapter's configuration.
        tensors: its tensors, whose shapes tell where they fit.
        prefix: where in the base the modules lie, as in `placing.parse_prefix`.

    Returns:
        Where the modules lie, and one site for each.

    Raises:
        BaseMismatchError: the base lacks a module, or the adapter one of its targets.
        InputError: it is not clear where the modules lie, two of them change one tensor, or a
            tensor is of no type that a delta changes.
    """
    paths = tuple(dict.fromkeys(module.path for module in modules))
    parts = {module.path: module.parts for module in modules if not module.depth}

    def weight(module: str, place: Place) -> str | None:
        parameters = targeted_parameters(module, place, architecture, config)
        if parameters:
            return next(filter(architecture.has, parameters), None)
        at = place.to_model(module)
        return None if at is None else architecture.weight(at)

    def is_complete(place: Place) -> bool:
        held = {architecture.names.get(weight(module, place) or "", "") for module in paths}
        return not any(missing_targets(held, place, architecture, config))

    place = find_place(
        paths,
        architecture,
        path,
        weight=weight,
        fits=lambda module, shape: _fits(parts.get(module, {}), tensors, shape),
        is_complete=is_complete,
        prefix=prefix,
    )
    sites = tuple(_site(path, module, place, architecture, config) for module in modules)
    _check_tensors(path, sites, architecture)
    _check_targets(path, sites, place, architecture, config)
    return place, sites


def _fits(parts: Mapping[str, str], tensors: AdapterTensors, shape: tuple[int, ...]) -> bool:
    """Return whether what a module's parts tell of the shape of its weight is true."""
    shapes = {part: tensors.info(key).shape for part, key in parts.items()}
    if "lora_A.weight" in shapes and "lora_B.weight" in shapes:
        A, B = shapes["lora_A.weight"], shapes["lora_B.weight"]
        product = (*B[:1], *A[1:])
        return shape == product or (len(shape) == 2 and shape[::-1] == product)
    if "lora_embedding_A" in shapes and "lora_embedding_B" in shapes:
        return shape == (*shapes["lora_embedding_A"][1:], *shapes["lora_embedding_B"][:1])
    if "vera_lambda_b" in shapes:
        return set(shapes["vera_lambda_b"]) <= set(shape)
    if "randlora_gamma" in shapes and len(shape) == 2:
        return shapes["randlora_gamma"][-1:] == (min(shape),)
    return True


def _site(
    path: Path,
    module: Module,
    place: Place,
    architecture: AdaptedArchitecture,
    config: AdapterConfig,
) -> AdapterSite:
    """Pair a module's keys with the tensor that they change."""
    names = targeted_parameters(module.path, place, architecture, config)
    if len(names) > 1 and architecture.module is None:
        raise InputError(
            f"{path} adapts {len(names)} parameters of {module.path}, and only the model's code"
            " tells which is which",
            fix="give the base as a folder with its config.json",
        )
    if module.depth >= max(len(names), 1):
        raise InputError(
            f"{path} holds {next(iter(module.parts.values()))}, a wrapper around another one,"
            f" but its target_parameters name {len(names)} parameters of {module.path}",
            fix="save the adapter again with its own configuration",
        )
    weight = architecture.weight(place.to_model(module.path) or "") or ""
    # the outermost wrapper, of depth 0, is of the last parameter
    name = names[-1 - module.depth] if names else weight
    if not architecture.has(name):
        raise BaseMismatchError(
            f"{architecture.base.path} has no tensor {name}, which {path} adapts",
            fix="give the base that the adapter was trained on",
        )
    return AdapterSite(
        module=module,
        name=name,
        tensor=architecture.names.get(name, ""),
        stack=architecture.stacks.get(name),
        is_parameter=bool(names),
    )


def _check_tensors(
    path: Path, sites: Sequence[AdapterSite], architecture: AdaptedArchitecture
) -> None:
    """See that no two sites change one tensor, but for tied ones, and that arithmetic can."""
    base, owners = architecture.base, dict[str, AdapterSite]()
    for site in sites:
        for name in site.tensors:
            other = owners.setdefault(name, site)
            is_tied = other.name != site.name and other.name in architecture.tied(site.name)
            if other is not site and not is_tied:
                raise InputError(
                    f"{path} changes {name} twice, as {other.module.path} and {site.module.path}",
                    fix="the file is mixed from two adapters: save it again",
                )
            info = base.info(name)
            if info.dtype not in dtypes.TARGETS:
                raise InputError(
                    f"{base.path} holds {name}, which the adapter changes, as {info.dtype}"
                    f" {info.shape}; a delta adds to {', '.join(sorted(dtypes.TARGETS))} alone",
                    fix="give the base before quantisation, or in another float type: the adapter"
                    " is the same",
                )


def _check_targets(
    path: Path,
    sites: Sequence[AdapterSite],
    place: Place,
    architecture: AdaptedArchitecture,
    config: AdapterConfig,
) -> None:
    """See that the adapter holds exactly what its configuration targets in this base."""
    held = frozenset(site.name for site in sites)
    is_tying = config.option("ensure_weight_tying", (bool, type(None))) is True
    owners = {site.name: site.module.owner for site in sites if not site.is_parameter}
    for site in sites:
        if site.is_parameter:
            continue
        # PEFT gives a tied layer its update beside the one that is targeted, never alone
        tied = (held & owners.keys() & set(architecture.tied(site.name))) - {site.name}
        if is_tying and any(is_targeted(owners[name], config) for name in tied):
            continue
        require_targeted(site.module.owner, site.tensor or site.name, config, path)
    missing = [
        *missing_targets({site.tensor for site in sites}, place, architecture, config),
        *((name, name) for name in missing_parameters(held, place, architecture, config)),
    ]
    if missing:
        module, name = missing[0]
        raise BaseMismatchError(
            f"{path} targets {module}, but holds nothing for the base's {name}",
            fix="give the adapter's own base; it may have more layers than the adapter knows",
        )
