"""A base's tensors by the names that they have in the model that an adapter was trained on.

What an adapter means depends on the model in memory: transformers renames tensors while loading,
stacks experts, ties embeddings, and builds no layers that its code does not know. So the base's
class is built without weights and asked. A base without a `config.json` that transformers
understands is taken as its file's names describe it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kilodelta.compress.adapters.skeleton import build_skeleton
from kilodelta.files.checkpoint import Checkpoint, read_config
from kilodelta.files.tying import first_names
from kilodelta.models.layer_names import CONV1D_MODELS, is_conv1d

_KINDS: Mapping[str, str] = {
    "Linear": "linear",
    "Conv1D": "conv1d",
    "Embedding": "embedding",
    "Conv1d": "convolution",
    "Conv2d": "convolution",
    "Conv3d": "convolution",
}
"""Class of a layer, or of one that it is derived from, to what PEFT takes it for."""
_HOMES = ("torch.nn.", "transformers.pytorch_utils")
"""Where those classes are defined; other libraries have some of the same name."""


@dataclass(frozen=True, kw_only=True)
class ExpertStack:
    """A parameter (experts, out, in) that is stacked in memory from matrices of the files.

    `parts[p][e]` is the base's matrix of expert `e` that gives the parameter's `p`-th span of
    rows: gate and up of a fused `gate_up_proj`, for example.
    """

    parts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class AdaptedArchitecture:
    """A base's tensors by the names that they have in the model in memory.

    Attributes:
        base: the tensors on disk.
        names: name in memory, or in the files, to the base's tensor.
        stacks: name in memory to the matrices of which it is made.
        rebuilt: names in memory that transformers computes from the files in any other way.
        ties: groups of names in memory that are one tensor.
        aliases: names among them that the files lack; `names` gives the tensor that they share.
        module: the model on the meta device; None where it cannot be built.
        is_adapted: whether `module` is of the class that the adapter's configuration names.
        config: the base's `config.json`.
    """

    base: Checkpoint
    names: Mapping[str, str]
    stacks: Mapping[str, ExpertStack] = field(default_factory=dict)
    rebuilt: frozenset[str] = frozenset()
    ties: tuple[tuple[str, ...], ...] = ()
    aliases: frozenset[str] = frozenset()
    module: Any = None
    is_adapted: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    def weight(self, path: str) -> str | None:
        """Return the name of the weight of the module at `path`; None where there is none."""
        return f"{path}.weight" if self.has(f"{path}.weight") else None

    def has(self, name: str) -> bool:
        """Return whether the base holds what the model calls `name`."""
        return name in self.names or name in self.stacks

    def kind(self, path: str) -> str:
        """Return what the layer at a module path is, such as `conv1d`; empty if unknown."""
        layer = self.layer(path)
        return "" if layer is None else _kind_of(layer) or "other"

    def layer(self, path: str) -> Any:
        """Return the layer at a module path, without weights; None if unknown."""
        try:
            return self.module.get_submodule(path) if self.module is not None else None
        except AttributeError:
            return None

    def layers(self) -> Iterator[tuple[str, str]]:
        """Yield the path and kind of every layer that can be adapted; nothing if unknown."""
        if self.module is not None:
            for path, layer in self.module.named_modules():
                kind = _kind_of(layer)
                if path and kind:
                    yield path, kind

    def is_conv1d(self, name: str, flag: bool) -> bool:
        """Return whether a weight is stored (in, out).

        Args:
            name: in memory.
            flag: the adapter's `fan_in_fan_out`, which PEFT sets by the last layer that it adapts;
                it decides only where nothing else does.
        """
        kind = self.kind(name.rpartition(".")[0])
        if kind in ("linear", "conv1d"):
            return kind == "conv1d"
        if self.config.get("model_type") in CONV1D_MODELS:
            return is_conv1d(self.names.get(name, name), self.config)
        return flag

    def tied(self, name: str) -> tuple[str, ...]:
        """Return the names in memory that are one tensor with `name`, it among them."""
        return next((group for group in self.ties if name in group), (name,))


def read_architecture(base: Checkpoint, adapter: Mapping[str, Any]) -> AdaptedArchitecture:
    """Describe the model that an adapter was trained on.

    Args:
        base: its weights; `config.json` is looked for beside them.
        adapter: the adapter's configuration, whose `auto_mapping` and `task_type` tell the class
            that was adapted where it is another than the base's own.
    """
    config = read_config(base)
    plain = AdaptedArchitecture(base=base, names={name: name for name in base.names}, config=config)
    folder = base.shards[0].path.parent
    if not (folder / "config.json").is_file():
        return plain
    module, is_adapted = build_skeleton(folder, adapter, len(base.names))
    if module is None:
        return plain
    names, sources = _named(module, base)
    if 2 * (len(names) + sum(map(len, sources.values()))) < len(base.names):
        return plain  # the configuration beside a lone file is another model's
    stacks = {place: stack for place, made in sources.items() if (stack := _stack(made, base))}
    rebuilt = frozenset(sources.keys() - stacks.keys())
    ties = _ties(module, names, base)
    aliases = {
        name: stored
        for group in ties
        for name in group
        if name not in names and (stored := next((names[n] for n in group if n in names), ""))
    }
    own = {name: name for name in base.names if name not in stacks.keys() | rebuilt}
    return AdaptedArchitecture(
        base=base,
        names={**own, **names, **aliases},
        stacks=stacks,
        rebuilt=rebuilt,
        ties=ties,
        aliases=frozenset(aliases),
        module=module,
        is_adapted=is_adapted,
        config=config,
    )


def _kind_of(layer: Any) -> str:
    """Return the kind of a layer, by its class and those that it is derived from."""
    for kind in type(layer).__mro__:
        if kind.__name__ in _KINDS and kind.__module__.startswith(_HOMES):
            return _KINDS[kind.__name__]
    return ""


_Source = tuple[str, str, Any, tuple[int, ...]]
"""A file's tensor, the converter's pattern that it matches, the converter, the shape in memory."""


def _named(module: Any, base: Checkpoint) -> tuple[dict[str, str], dict[str, list[_Source]]]:
    """Find out which tensor of the files each tensor in memory is, or of which it is made."""
    state = module.state_dict()
    names: dict[str, str] = {}
    sources: dict[str, list[_Source]] = {}
    for name, place, pattern, converter in _renamed(module, base):
        if place not in state:
            continue  # a layer that this class does not build
        if pattern is None:
            names[place] = name if place == name else names.get(place, name)
        else:
            shape = tuple(state[place].shape)
            sources.setdefault(place, []).append((name, pattern, converter, shape))
    return names, sources


def _renamed(module: Any, base: Checkpoint) -> Iterator[tuple[str, str, str | None, Any]]:
    """Yield (name in the files, name in memory, converter's pattern, converter) as transformers'
    own loading pairs them; before version 5 it only adds or removes the base model's prefix."""
    state, prefix = module.state_dict(), module.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:
        for name in base.names:
            added, removed = f"{prefix}.{name}", name.removeprefix(f"{prefix}.")
            yield name, next((n for n in (name, added, removed) if n in state), name), None, None
        return
    conversions = get_model_conversion_mapping(module)
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    renamings = [c for c in conversions if not isinstance(c, WeightConverter)]
    for name in base.names:
        place, pattern = rename_source_key(name, renamings, converters, prefix, state)
        owner = next((c for c in converters if pattern in c.source_patterns), None)
        yield name, place, pattern, owner


def _stack(made_of: Sequence[_Source], base: Checkpoint) -> ExpertStack | None:
    """Recognise experts that lie one by one in the files; None for other ways to make a tensor."""
    _, _, converter, shape = made_of[0]
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    if steps not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        return None
    parts = tuple(
        tuple(sorted((name for name, p, *_ in made_of if p == pattern), key=_in_number_order))
        for pattern in converter.source_patterns
    )
    shapes = [{base.info(name).shape for name in part} for part in parts]
    if any(len(part) != shape[0] for part in parts) or any(len(found) != 1 for found in shapes):
        return None
    matrices = [next(iter(found)) for found in shapes]
    if any(len(matrix) != 2 or matrix[1:] != shape[2:] for matrix in matrices):
        return None
    return ExpertStack(parts=parts) if sum(height for height, _ in matrices) == shape[1] else None


def _in_number_order(name: str) -> list[tuple[int, int, str]]:
    """Sort `experts.10` behind `experts.9`."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in name.split(".")]


def _ties(module: Any, names: Mapping[str, str], base: Checkpoint) -> tuple[tuple[str, ...], ...]:
    """Group the names of one tensor in memory.

    transformers 5 loads two tensors untied, against the configuration, where the files hold
    both and they differ.
    """
    groups: dict[str, list[str]] = {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, first in first_names(parameters).items():
        groups.setdefault(first, []).append(name)
    return tuple(
        tuple(group)
        for group in groups.values()
        if len(group) > 1 and _are_equal(base, {names[n] for n in group if n in names})
    )


def _are_equal(base: Checkpoint, names: set[str]) -> bool:
    first, *others = sorted(names) or [""]
    return all(base.raw(name).equals(base.raw(first)) for name in others)
