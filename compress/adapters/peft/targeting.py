"""Which modules an adapter's configuration targets, by PEFT's own rules, and whether it has them.

As in PEFT 0.21: `check_target_module_exists` for `target_modules`, `exclude_modules`,
`layers_to_transform` and `layers_pattern`; `_set_trainable` for `modules_to_save`.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from pathlib import Path

from kilodelta.compress.adapters.architecture import AdaptedArchitecture
from kilodelta.compress.adapters.peft.config import AdapterConfig
from kilodelta.compress.adapters.placing import Place
from kilodelta.errors import BaseMismatchError

ALL_LINEAR = "all-linear"

ADAPTED_KINDS = {
    "LORA": frozenset({"linear", "conv1d", "embedding", "convolution"}),
    "RANDLORA": frozenset({"linear", "conv1d"}),
    "UNILORA": frozenset({"linear", "conv1d"}),
    "VERA": frozenset({"linear", "conv1d"}),
}
"""`peft_type` to the kinds of layers that PEFT adapts with it."""


def is_targeted(path: str, config: AdapterConfig) -> bool:
    """Return whether PEFT adapts the module at a path.

    Raises:
        InputError: a setting is of the wrong type, no expression, or takes too long to match.
    """
    targets, expressions = config.text_or_texts("target_modules"), config.expressions
    if is_excluded(path, config):
        return False
    if isinstance(targets, str):
        return targets.lower() == ALL_LINEAR or expressions.covers(targets, path)
    if path in targets:
        return True
    return _ends(path, targets) and _is_chosen_layer(path, config)


def is_excluded(path: str, config: AdapterConfig) -> bool:
    """Return whether `exclude_modules` or `modules_to_save` keep PEFT from adapting a module.

    Raises:
        InputError: as `is_targeted`.
    """
    excluded, expressions = config.text_or_texts("exclude_modules"), config.expressions
    if isinstance(excluded, str):
        if excluded and expressions.covers(excluded, path):
            return True
    elif path in excluded or _ends(path, excluded):
        return True
    return any(
        expressions.begins(rf"(^|.*\.){saved}($|\..*)", saved, path)
        for saved in config.texts("modules_to_save")
    )


def is_saved(name: str, config: AdapterConfig) -> bool:
    """Return whether a tensor lies in a module of `modules_to_save`.

    PEFT takes every module whose path ends with one of these texts, be it within a word.
    """
    saved, parts = config.texts("modules_to_save"), name.split(".")[:-1]
    paths = (".".join(parts[: count + 1]) for count in range(len(parts)))
    return bool(saved) and any(path.endswith(saved) for path in paths)


def _ends(path: str, targets: Iterable[str]) -> bool:
    """Return whether a path ends with one of the targets, after a dot."""
    endings = set(targets)
    return any(path[at + 1 :] in endings for at, letter in enumerate(path) if letter == ".")


def _is_chosen_layer(path: str, config: AdapterConfig) -> bool:
    """Return whether `layers_to_transform` lets a module pass: 0 is a layer, an empty list none."""
    chosen = config.values.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    numbers = chosen if isinstance(chosen, list) else [chosen]
    if not all(type(number) is int for number in numbers):
        raise config.wrong("layers_to_transform", chosen)
    found = _layer_number(path, config)
    return found is not None and found in numbers


def _layer_number(path: str, config: AdapterConfig) -> int | None:
    """Return the number of the layer that a module belongs to, the first one in its path."""
    given = config.text_or_texts("layers_pattern")
    patterns = [given] if isinstance(given, str) else sorted(given)
    for pattern in filter(None, patterns):
        match = config.expressions.first(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.", pattern, path)
        if match is not None:
            return int(match)
    if any(patterns):
        return None
    parts = path.split(".")
    # PEFT's `.*?\.[^.]*\.(?P<idx>\d+)\.`: a number with two parts before it and one behind
    numbers = (int(part) for part in parts[2:-1] if part.isdecimal() and part.isascii())
    return next(numbers, None)


def require_targeted(path: str, name: str, config: AdapterConfig, where: Path) -> None:
    """See that an adapter has tensors only for what its configuration targets.

    Args:
        path: a module that the adapter has tensors for.
        name: the base's tensor that it changes.
        config: the adapter's configuration.
        where: the adapter, for errors.

    Raises:
        BaseMismatchError: the module is not targeted.
        InputError: as `is_targeted`.
    """
    if not is_targeted(path, config):
        raise BaseMismatchError(
            f"{where} holds tensors for {path} ({name}), which its target_modules leave out",
            fix="the folder is mixed from two adapters: save it again",
        )


def missing_targets(
    held: Container[str], place: Place, architecture: AdaptedArchitecture, config: AdapterConfig
) -> Iterator[tuple[str, str]]:
    """Yield the modules that PEFT adapts in this base, but the adapter has nothing for.

    Layers that the files hold and transformers does not build (`mtp.*`, or more layers than the
    configuration says) are none of them.

    Args:
        held: the base's tensors that the adapter changes.
        place: where in the base they lie.
        architecture: the base.
        config: the adapter's configuration.

    Yields:
        (path in the adapter, tensor of the base), the tensor by its name in the model.

    Raises:
        InputError: as `is_targeted`.
    """
    targets = config.values.get("target_modules")
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return  # which layers those were, only the model that was trained can tell
    for path in _adaptable(architecture, str(config.values.get("peft_type"))):
        own, weight = place.to_adapter(path), architecture.weight(path)
        if own is None or weight is None:
            continue
        tensor = architecture.names.get(weight, weight)
        if tensor not in held and is_targeted(own, config):
            yield own, tensor


def _adaptable(architecture: AdaptedArchitecture, method: str) -> Iterator[str]:
    """Yield the paths of layers that a method could adapt; by the files if nothing else tells."""
    if architecture.module is not None:
        kinds = ADAPTED_KINDS[method]
        yield from (path for path, kind in architecture.layers() if kind in kinds)
        return
    base = architecture.base
    for name, tensor in architecture.names.items():
        path, _, leaf = name.rpartition(".")
        if path and leaf == "weight" and len(base.info(tensor).shape) >= 2:
            yield path
