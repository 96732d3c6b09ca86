"""A PEFT adapter folder beside its base: its configuration, its tensors, whose tensors they change.

`adapter_config.json` and `adapter_model.safetensors`, as HF PEFT's `save_pretrained` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.compress.adapters.architecture import Architecture, Stack, read_architecture
from kilodelta.compress.adapters.peft.config import CONFIG, AdapterConfig
from kilodelta.compress.adapters.peft.keys import Keys, Module, sort_keys
from kilodelta.compress.adapters.peft.parameters import missing_parameters, targeted_parameters
from kilodelta.compress.adapters.peft.targeting import missing_targets, require_targeted
from kilodelta.compress.adapters.peft.unilora_order import adapted_modules
from kilodelta.compress.adapters.placing import Place, find_place
from kilodelta.compress.adapters.tensors import Tensors
from kilodelta.compress.distill.changes.patterns import patterns_for
from kilodelta.errors import BaseMismatchError, CheckpointError, InputError
from kilodelta.files import dtypes
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.quantise import Floats
from kilodelta.format.targets import Patterns

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True, kw_only=True)
class Site:
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
    stack: Stack | None = None
    is_parameter: bool = False

    @property
    def pattern_path(self) -> str:
        """The path that `rank_pattern` and `alpha_pattern` are matched with."""
        leaf = self.name.rpartition(".")[2]
        return f"{self.module.path}.{leaf}" if self.is_parameter else self.module.owner


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter and the base that it belongs to."""

    path: Path
    config: AdapterConfig
    tensors: Tensors
    keys: Keys
    architecture: Architecture
    place: Place
    sites: tuple[Site, ...]

    @property
    def base(self) -> Checkpoint:
        return self.architecture.base

    @property
    def rank(self) -> int:
        """`r`.

        Raises:
            InputError: it is no positive whole number.
        """
        return self.config.rank

    def option(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return one setting; see `AdapterConfig.option`."""
        return self.config.option(name, kind, default)

    def floats(self, key: str) -> Floats:
        """Take a tensor of the adapter as float32; see `Tensors.floats`."""
        return self.tensors.floats(key)

    def shaped(self, key: str, shape: tuple[int, ...]) -> Floats:
        """Take a tensor of the adapter as float32, of one shape only.

        Raises:
            CheckpointError: it is missing or of no float type.
            InputError: it has another shape, or holds NaN or infinity.
        """
        found = self.tensors.info(key).shape
        if found != shape:
            raise InputError(
                f"{self.path}: tensor {key} has shape {found}, the base and {CONFIG} want {shape}",
                fix="give the adapter's own base and its unchanged configuration"
                if found and 0 not in found
                else "it is empty: gather the parameters before saving (DeepSpeed ZeRO-3, FSDP)",
            )
        return self.tensors.floats(key)

    def matrices(self) -> dict[str, Site]:
        """Return the sites by the base's tensors, for methods that change whole tensors alone.

        Raises:
            InputError: a site is a stack of experts.
        """
        for site in self.sites:
            if site.stack is not None:
                raise InputError(
                    f"{self.path} adapts {site.name}, which the base holds as"
                    f" {sum(map(len, site.stack.parts))} matrices",
                    fix="merge it with PEFT (merge_and_unload) and run kilodelta compress",
                )
        return {site.tensor: site for site in self.sites}

    def patterns(self, chosen: Sequence[str], transposed: Sequence[str]) -> Patterns:
        """Make few globs that choose exactly some of the base's tensors.

        Args:
            chosen: the tensors to change.
            transposed: those of them that are stored (in, out).
        """
        wanted = set(chosen)
        others = [name for name in self._matrices if name not in wanted]
        straight = [name for name in sorted(wanted) if name not in set(transposed)]
        return Patterns(
            include=patterns_for(sorted(wanted), others),
            transposed=patterns_for(sorted(transposed), straight) if transposed else (),
        )

    @property
    def _matrices(self) -> list[str]:
        infos = (self.base.info(name) for name in self.base.names)
        return [i.name for i in infos if i.dtype in dtypes.TARGETS and len(i.shape) >= 2]


def open_adapter(path: Path, config: AdapterConfig, base: Checkpoint, prefix: str = "") -> Adapter:
    """Open an adapter's folder and find its modules in the base.

    Args:
        path: the folder.
        config: what `read_config` read there.
        base: the model that it was trained on.
        prefix: where in the base its modules lie, as in `placing.parse_prefix`.

    Raises:
        CheckpointError: files are missing, damaged, or pickles.
        BaseMismatchError: the base lacks a module, or the adapter one of its targets.
        InputError: a key, a setting or the place of the modules is not clear.
    """
    method = str(config.values.get("peft_type"))
    tensors = Tensors(Checkpoint.open(_weights(path)))
    keys = sort_keys(tensors.names, method)
    tensors.use(keys.replaced)
    architecture = read_architecture(base, config.values)
    modules = keys.modules
    if not modules and method == "UNILORA":
        modules = adapted_modules(config, architecture)
    place = _find(path, modules, architecture, config, tensors, prefix)
    sites = tuple(_sites(path, modules, place, architecture, config))
    _check_types(sites, base)
    _check_targets(path, sites, place, architecture, config)
    return Adapter(
        path=path,
        config=config,
        tensors=tensors,
        keys=keys,
        architecture=architecture,
        place=place,
        sites=sites,
    )


def _weights(path: Path) -> Path:
    place = path / WEIGHTS
    if not place.exists() and (path / PICKLE).exists():
        raise CheckpointError(
            f"{path} holds its tensors in {PICKLE}, a pickle: reading it could run anything",
            fix="load it with PEFT where you trust it, and save_pretrained(..., "
            "safe_serialization=True)",
        )
    return place


def _find(
    path: Path,
    modules: Sequence[Module],
    architecture: Architecture,
    config: AdapterConfig,
    tensors: Tensors,
    prefix: str,
) -> Place:
    """Find the place of all modules; of several, the one where none of the targets is missing."""

    def weight(module: str, place: Place) -> str | None:
        parameters = targeted_parameters(module, place, architecture, config)
        if parameters:
            return next(filter(architecture.has, parameters), None)
        at = place.to_model(module)
        return None if at is None else architecture.weight(at)

    def is_complete(place: Place) -> bool:
        held = {architecture.names.get(weight(module, place) or "", "") for module in paths}
        return not any(missing_targets(held, place, architecture, config))

    paths = tuple(dict.fromkeys(module.path for module in modules))
    parts = {module.path: module.parts for module in modules if not module.depth}
    return find_place(
        paths,
        architecture,
        path,
        weight=weight,
        fits=lambda module, shape: _fits(parts.get(module, {}), tensors, shape),
        is_complete=is_complete,
        prefix=prefix,
    )


def _fits(parts: Mapping[str, str], tensors: Tensors, shape: tuple[int, ...]) -> bool:
    """Return whether what a module's parts tell of the shape of its weight is true."""
    known = {part: tensors.info(key).shape for part, key in parts.items()}
    if "lora_A.weight" in known and "lora_B.weight" in known:
        A, B = known["lora_A.weight"], known["lora_B.weight"]
        product = (*B[:1], *A[1:])
        return shape == product or (len(shape) == 2 and shape[::-1] == product)
    if "lora_embedding_A" in known and "lora_embedding_B" in known:
        return shape == (*known["lora_embedding_A"][1:], *known["lora_embedding_B"][:1])
    if "vera_lambda_b" in known:
        return known["vera_lambda_b"][0] in shape
    if "randlora_gamma" in known and len(shape) == 2:
        return known["randlora_gamma"][-1] == min(shape)
    return True


def _sites(
    path: Path,
    modules: Sequence[Module],
    place: Place,
    architecture: Architecture,
    config: AdapterConfig,
) -> list[Site]:
    """Pair every module's keys with the tensor that they change."""
    found = []
    for module in modules:
        names = targeted_parameters(module.path, place, architecture, config)
        weight = architecture.weight(place.to_model(module.path) or "")
        if len(names) > 1 and architecture.module is None:
            raise InputError(
                f"{path} adapts {len(names)} parameters of {module.path}, and only the model's code"
                " tells which is which",
                fix="give the base as a folder with its config.json",
            )
        name = names[len(names) - 1 - module.depth] if module.depth < len(names) else weight
        if name is None or (module.depth and module.depth >= len(names)):
            raise InputError(
                f"{path} holds {next(iter(module.parts.values()))}, a wrapper around another one,"
                f" but its target_parameters name {len(names)} parameters of {module.path}",
                fix="save the adapter again with its own configuration",
            )
        found.append(
            Site(
                module=module,
                name=name,
                tensor=architecture.names.get(name, ""),
                stack=architecture.stacks.get(name),
                is_parameter=bool(names),
            )
        )
    return found


def _check_types(sites: Sequence[Site], base: Checkpoint) -> None:
    for site in sites:
        stacked = [name for part in site.stack.parts for name in part] if site.stack else []
        for name in stacked or [site.tensor]:
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
    sites: Sequence[Site],
    place: Place,
    architecture: Architecture,
    config: AdapterConfig,
) -> None:
    """See that the adapter holds exactly what its configuration targets in this base."""
    held = frozenset(site.name for site in sites)
    is_tying = config.option("ensure_weight_tying", (bool, type(None))) is True
    for site in sites:
        tied = held.intersection(architecture.tied(site.name)) - {site.name}
        if site.is_parameter or (is_tying and tied):
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
