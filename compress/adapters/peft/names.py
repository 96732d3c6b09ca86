"""PEFT's key names, and the base's tensors that they speak of.

A key is `base_model.model.<module path>.<what>`; `<what>` begins with the method's prefix
(`lora_A.weight`, `randlora_lambda`, ...). Other keys are tensors stored whole (`modules_to_save`,
`bias`), or belong to the whole adapter (`base_model.randlora_A`). The module paths are those of the
model in memory, whose tensors transformers may call otherwise than the files do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.errors import BaseMismatchError, CheckpointError, InputError, KiloDeltaError
from kilodelta.files.checkpoint import Checkpoint

ROOT = "base_model.model."
_OWN = re.compile(r"(?:lora|randlora|vera|unilora)_\w+(?:\.(?:weight|bias))?\Z")
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.)")
_REPLACED = ".original_module."


@dataclass(frozen=True, kw_only=True)
class Keys:
    """An adapter's keys, sorted by what they are."""

    modules: tuple[str, ...]
    """Paths of the adapted modules."""
    whole: Mapping[str, str]
    """Keys of tensors stored whole, to the names that the model gives them."""


def sort_keys(names: Iterable[str], method: str) -> Keys:
    """Tell a method's own keys from tensors stored whole; `method` is its `peft_type`.

    Raises:
        CheckpointError: a key is none of PEFT's, or another method's.
    """
    modules: dict[str, None] = {}
    whole = {}
    for key in names:
        owner, own = _split(key)
        if not own:
            if not key.startswith(ROOT):
                raise CheckpointError(
                    f"tensor {key!r:.200} is no key of a PEFT adapter",
                    fix="give the adapter as PEFT's save_pretrained wrote it",
                )
            whole[key] = _WRAPPED.sub("", key.removeprefix(ROOT))
        elif not own.startswith(method.lower() + "_"):
            raise CheckpointError(
                f"tensor {key!r:.200} belongs to another method than {method}",
                fix="the folder is mixed from two adapters: save it again",
            )
        elif owner.startswith(ROOT):
            modules[owner.removeprefix(ROOT)] = None
    return Keys(modules=tuple(modules), whole=_once(whole))


def _once(whole: Mapping[str, str]) -> dict[str, str]:
    """With `bias="all"` PEFT writes a saved module's bias three times: as it is, in its wrapper,
    and as it was before, which is not wanted."""
    kept = {key: name for key, name in whole.items() if _REPLACED not in key}
    first = {name: key for key, name in sorted(kept.items(), key=lambda item: -len(item[0]))}
    return {key: name for name, key in first.items()}


def _split(key: str) -> tuple[str, str]:
    """(owner, what) of a method's own key; what is empty for others."""
    parts = key.split(".")
    for count in (1, 2):
        what = ".".join(parts[-count:])
        if len(parts) > count and _OWN.match(what):
            return ".".join(parts[:-count]), what
    return key, ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """How module paths become the base's tensor names: some front cut, some front added, and what
    the model calls a tensor looked up."""

    cut: str
    added: str
    names: Mapping[str, str]
    """The model's name of a tensor, to the base's."""
    tensors: Mapping[str, str]
    """Module path to the base's weight."""

    def name(self, name: str) -> str:
        """The base's name of another tensor of the same model; its own where it is new."""
        return self.names.get(self.added + name.removeprefix(self.cut), name)

    def path(self, name: str) -> str | None:
        """The path of the module whose weight the model calls `name`, as the adapter has it."""
        if not name.endswith(".weight") or not name.startswith(self.added):
            return None
        return self.cut + name.removeprefix(self.added).removesuffix(".weight")


def find_modules(paths: tuple[str, ...], base: Checkpoint, where: Path) -> Place:
    """Find the weight of every adapted module in the base.

    A model with a head calls its encoder's tensors `bert.encoder...`, the encoder alone
    `encoder...`: one front is cut or added for all of them.

    Raises:
        InputError: the adapter adapts nothing.
        BaseMismatchError: a module is not in the base.
    """
    if not paths:
        raise InputError(f"{where} adapts no module", fix="give a trained adapter's folder")
    for names in _namings(base):
        for cut, added in _moves(paths, names):
            weights = {path: f"{added}{path.removeprefix(cut)}.weight" for path in paths}
            if all(weight in names for weight in weights.values()):
                tensors = {path: names[weight] for path, weight in weights.items()}
                return Place(cut=cut, added=added, names=names, tensors=tensors)
    missing = next(path for path in paths if f"{path}.weight" not in base)
    raise BaseMismatchError(
        f"{base.path} has no tensor {missing}.weight, which {where} adapts",
        fix="give the base that the adapter was trained on",
    )


def _namings(base: Checkpoint) -> Iterator[Mapping[str, str]]:
    """What the base's tensors may be called: as in its files, then as transformers renames them,
    for which the model must be opened."""
    yield {name: name for name in base.names}
    if not (base.path / "config.json").is_file():
        return
    try:
        from kilodelta.models.load import open_model

        loaded = open_model(base.path).names
    except (KiloDeltaError, ModuleNotFoundError):
        return
    yield {state: name for name, state in loaded.items()}


def _moves(paths: tuple[str, ...], names: Iterable[str]) -> list[tuple[str, str]]:
    """(cut, added) to try, the plainest first."""
    fronts = dict.fromkeys(name.partition(".")[0] + "." for name in names if "." in name)
    first = paths[0].split(".")
    cuts = [".".join(first[:count]) + "." for count in range(1, len(first))]
    common = [cut for cut in cuts if all(path.startswith(cut) for path in paths)]
    return [("", ""), *((cut, "") for cut in common), *(("", front) for front in fronts)]


def check_targets(place: Place, config: Mapping[str, Any], base: Checkpoint, where: Path) -> None:
    """The adapter must hold exactly what its configuration targets in this base.

    Raises:
        BaseMismatchError: it lacks a module that it targets, or holds one that it does not.
    """
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return
    for path, name in place.tensors.items():
        if not is_targeted(path, targets):
            raise BaseMismatchError(
                f"{where} holds tensors for {path} ({name}), which its target_modules leave out",
                fix="the folder is mixed from two adapters: save it again",
            )
    if any(config.get(key) for key in ("layers_to_transform", "exclude_modules")):
        return
    for known, name in place.names.items():
        module = place.path(known)
        if module is None or len(base.info(name).shape) < 2 or module in place.tensors:
            continue
        if is_targeted(module, targets):
            raise BaseMismatchError(
                f"{where} targets {module}, but holds nothing for the base's {name}",
                fix="give the adapter's own base; it may have more layers than the adapter knows",
            )


def is_targeted(path: str, targets: str | list[str]) -> bool:
    """PEFT's rule: a text is a regular expression over the whole path, a list holds its ends."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == end or path.endswith(f".{end}") for end in targets)
