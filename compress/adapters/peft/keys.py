"""PEFT's key names, sorted by what they are.

A key is `base_model.model.<module path>.<part>`, and a method has a handful of parts
(`lora_A.weight`, `randlora_lambda`, ...); a few belong to the whole adapter
(`base_model.randlora_A`). Other keys are tensors stored whole (`modules_to_save`, `bias`). Around
these, other tools leave traces: no root, an adapter's name behind the part (a dump of a training
state), and the wrappers of torch.compile, FSDP and DDP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kilodelta.errors import CheckpointError, InputError

ROOT = "base_model.model."
"""What PEFT puts before every module path."""

PARTS: Mapping[str, tuple[str, ...]] = {
    "LORA": (
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_embedding_B",
    ),
    "RANDLORA": ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    "UNILORA": (
        "unilora_indices_A",
        "unilora_indices_B",
        "unilora_scales_A",
        "unilora_scales_B",
        "unilora_theta_d",
    ),
    "VERA": ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
}
"""`peft_type` to the parts that a module, or the whole adapter, has."""

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Modules that torch.compile, FSDP and activation checkpointing put around others."""

_PART = re.compile(
    r"(?P<path>.*?)\.?(?P<what>(?:{}))(?:\.(?P<name>[^.]+?))??(?P<leaf>\.(?:weight|bias))?\Z".format(
        "|".join(sorted({part.partition(".")[0] for parts in PARTS.values() for part in parts}))
    )
)


@dataclass(frozen=True, kw_only=True)
class Module:
    """One adapted module: its path without PEFT's `base_layer`s, and its parts' keys.

    `depth` counts the `base_layer`s at the path's end. PEFT nests one wrapper inside the other
    where it adapts several parameters of one module, so they tell which parameter this is.
    """

    path: str
    depth: int
    owner: str
    """The path that PEFT's patterns are about: for a layer within an adapted layer, the outer."""
    parts: Mapping[str, str]

    def key(self, part: str) -> str:
        """Return the key of a part, as PEFT spells it where the adapter has none."""
        return self.parts.get(part, f"{ROOT}{self.path}{'.base_layer' * self.depth}.{part}")


@dataclass(frozen=True, kw_only=True)
class Keys:
    """An adapter's keys, sorted."""

    modules: tuple[Module, ...]
    shared: Mapping[str, str]
    """Parts of the whole adapter, to their keys."""
    whole: Mapping[str, tuple[str, ...]]
    """Names in the model of tensors stored whole, to their keys: PEFT may store one twice."""
    replaced: tuple[str, ...]
    """Keys of what was there before a module was saved; nobody needs them."""


def sort_keys(names: Iterable[str], method: str) -> Keys:
    """Sort an adapter's keys.

    Args:
        names: the keys.
        method: the adapter's `peft_type`.

    Raises:
        CheckpointError: a key is another method's.
        InputError: two keys mean one tensor, or the keys name more than one adapter.

    Example:
        >>> names = ["base_model.model.a.lora_A.weight", "base_model.model.b.bias"]
        >>> keys = sort_keys(names, "LORA")
        >>> keys.modules[0].path, keys.modules[0].parts
        ('a', {'lora_A.weight': 'base_model.model.a.lora_A.weight'})
        >>> dict(keys.whole)
        {'b.bias': ('base_model.model.b.bias',)}
    """
    modules: dict[tuple[str, int, str], dict[str, str]] = {}
    shared: dict[str, str] = {}
    whole: dict[str, list[str]] = {}
    replaced: list[str] = []
    named: dict[str, str] = {}
    for key in names:
        plain = _unwrapped(key)
        split = _split(plain)
        if split is None:
            name = _module_name(plain)
            if name is None:
                replaced.append(key)
            else:
                whole.setdefault(name, []).append(key)
            continue
        path, part, adapter = split
        _check_method(key, part, method)
        named.setdefault(adapter, key)
        if path in ("", "base_model"):
            _put(shared, part, key)
        else:
            _put(modules.setdefault(_nesting(path), {}), part, key)
    _check_adapters(named)
    return Keys(
        modules=tuple(
            Module(path=path, depth=depth, owner=owner, parts=parts)
            for (path, depth, owner), parts in modules.items()
        ),
        shared=shared,
        whole={name: tuple(keys) for name, keys in whole.items()},
        replaced=tuple(replaced),
    )


def _unwrapped(key: str) -> str:
    """Return a key without other tools' wrappers and without PEFT's root, if it has one."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":  # DDP
        parts = parts[1:]
    return ".".join(parts).removeprefix(ROOT)


def _split(key: str) -> tuple[str, str, str] | None:
    """Return (module path, part, adapter's name) of a method's own key."""
    match = _PART.match(key)
    if match is None or (match["path"] and not key.startswith(match["path"] + ".")):
        return None
    part = match["what"] + (match["leaf"] or "")
    if not any(part in parts for parts in PARTS.values()):
        return None
    return match["path"], part, match["name"] or ""


def _nesting(path: str) -> tuple[str, int, str]:
    """Return (path without `base_layer`s, how many of them end it, path before an inner one)."""
    parts = path.split(".")
    depth = 0
    while parts and parts[-1] == "base_layer":
        parts.pop()
        depth += 1
    plain = [part for part in parts if part != "base_layer"]
    owner = parts[: parts.index("base_layer")] if "base_layer" in parts else parts
    return ".".join(plain), depth, ".".join(owner)


def _module_name(key: str) -> str | None:
    """Return a tensor's name in the model; None for what a saved module replaces."""
    parts = [part for part in key.split(".") if part != "base_layer"]
    if "original_module" in parts:
        return None
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        # a dump of a training state has the adapter's name there, before the tensor's own path
        behind = 2 if len(parts) > at + 2 else 1
        parts = parts[:at] + parts[at + behind :]
    return ".".join(parts)


def _check_method(key: str, part: str, method: str) -> None:
    if part not in PARTS[method]:
        raise CheckpointError(
            f"tensor {key!r:.200} belongs to another method than {method}",
            fix="the folder is mixed from two adapters: save it again",
        )


def _put(parts: dict[str, str], part: str, key: str) -> None:
    if part in parts:
        raise InputError(
            f"tensors {parts[part]!r:.200} and {key!r:.200} mean one tensor of the adapter",
            fix="the file is mixed from two adapters: save it again",
        )
    parts[part] = key


def _check_adapters(named: Mapping[str, str]) -> None:
    if len(named) > 1:
        texts = [f"{key!r:.200} ({name[:40] or 'without a name'})" for name, key in named.items()]
        raise InputError(
            f"the file holds tensors of more than one adapter: {' and '.join(texts[:2])}",
            fix="save one adapter: model.save_pretrained(folder, selected_adapters=[name])",
        )
