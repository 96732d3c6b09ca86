"""What an adapter stores whole: trained modules and biases, and what PEFT saves beside them.

`modules_to_save` and trained biases replace the base's tensors, or are new. A targeted embedding's
own weight, and with `bias="all"` every bias, are stored too; those equal the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kilodelta.compress.adapters.peft.folder import Adapter
from kilodelta.compress.adapters.peft.targeting import is_saved
from kilodelta.errors import BaseMismatchError, CheckpointError, InputError
from kilodelta.files.dtypes import FLOATS
from kilodelta.files.tensor import RawTensor

_EMBEDDINGS = frozenset({"embed_tokens", "lm_head"})
"""PEFT's names of embeddings, which it saves when they were resized."""


@dataclass(frozen=True, kw_only=True)
class WholeTensors:
    """Tensors that replace the base's or are new.

    Attributes:
        tensors: by their names in the model.
        notes: what a user should know of them, each a sentence.
        config: what they change in the base's `config.json`.
    """

    tensors: Mapping[str, RawTensor]
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)


def read_whole(adapter: Adapter) -> WholeTensors:
    """Read the tensors that an adapter stores whole and that differ from the base's.

    Raises:
        CheckpointError: copies of one tensor differ.
        BaseMismatchError: a targeted weight is not the base's, or a saved module lacks a tensor.
        InputError: a tensor is one that no setting explains.
    """
    tensors: dict[str, RawTensor] = {}
    for name, keys in adapter.keys.whole.items():
        tensor = _only(adapter, keys)
        place = _in_model(adapter, name)
        if _is_base(adapter, place, tensor):
            continue
        _require_explained(adapter, name, place, keys[0], tensor)
        if tensor.dtype in FLOATS:
            adapter.floats(keys[0])  # refuses what is not finite
        _put(adapter, tensors, name, place, tensor)
    _require_whole_modules(adapter)
    new = sorted(name for name in tensors if name not in adapter.architecture.names)
    return WholeTensors(
        tensors=tensors,
        notes=tuple(f"{name} is new: the base has no tensor of that name" for name in new),
        config=_config(adapter, tensors, new),
    )


def _put(
    adapter: Adapter, tensors: dict[str, RawTensor], name: str, place: str, tensor: RawTensor
) -> None:
    """Put a tensor where PEFT loads it: into a saved module's own copy, else into the model's
    tensor, which other layers may share.

    Raises:
        InputError: two tensors go to one place.
    """
    places = (place,) if is_saved(name, adapter.config) else adapter.architecture.tied(place)
    for each in places:
        if each in tensors and not tensors[each].equals(tensor):
            raise InputError(
                f"{adapter.path} holds two different tensors for {' and '.join(places)}, which are"
                " one in the base (tied weights)",
                fix="save the adapter again with save_embedding_layers=False",
            )
        tensors[each] = tensor


def _only(adapter: Adapter, keys: tuple[str, ...]) -> RawTensor:
    """Take a tensor that may be stored more than once."""
    first, *others = (adapter.tensors.raw(key) for key in keys)
    for key, other in zip(keys[1:], others, strict=True):
        if not first.equals(other):
            raise CheckpointError(
                f"{adapter.path}: {key} differs from {keys[0]}, of which it is a copy",
                fix="the file is mixed from two adapters: save it again",
            )
    return first


def _in_model(adapter: Adapter, name: str) -> str:
    """Return a saved tensor's name in the base's model: its own where it lies outside."""
    return adapter.place.to_model(name) or name


def _is_base(adapter: Adapter, place: str, tensor: RawTensor) -> bool:
    name = adapter.architecture.names.get(place)
    if name is None:
        return False
    before = adapter.base.raw(name)
    if before.shape != tensor.shape:
        return False
    if before.dtype == tensor.dtype:
        return before.equals(tensor)
    if not {before.dtype, tensor.dtype} <= FLOATS.keys():
        return False
    ours, theirs = (FLOATS[each.dtype].widen(each.data) for each in (before, tensor))
    return bool(np.array_equal(ours, theirs))


def _require_explained(
    adapter: Adapter, name: str, place: str, key: str, tensor: RawTensor
) -> None:
    """See that a setting says why a tensor is stored, and that it has a place to go."""
    known = adapter.architecture.names.get(place)
    if known is not None and place in {site.name for site in adapter.sites}:
        raise BaseMismatchError(
            f"the adapter holds its own {known} {tensor.shape}, which is not the base's",
            fix="give the base that it was trained on, with the same vocabulary",
        )
    if known is None and not _can_be_new(adapter, place):
        raise InputError(
            f"{adapter.path} holds {key!r:.200} {tensor.shape}, and neither the base nor the model"
            f" of its configuration has a tensor {place}",
            fix="give the adapter's own base; if it lies elsewhere there, say so with --prefix",
        )
    if not is_saved(name, adapter.config) and not (known and _is_trained(adapter, name)):
        raise InputError(
            f"{adapter.path} holds {key!r:.200} {tensor.shape}, which is neither a part of the"
            f" adapter nor in its modules_to_save{'' if known else ', nor in the base'}",
            fix="save the adapter again with its own configuration, or leave this tensor out if it"
            " belongs to something else",
        )


def _can_be_new(adapter: Adapter, place: str) -> bool:
    """Return whether the model may have a tensor that the files lack, such as a new head's."""
    architecture = adapter.architecture
    if place in architecture.rebuilt or place in architecture.stacks:
        return False
    if not architecture.is_adapted:
        return True
    names: set[str] = set(architecture.module.state_dict())
    return place in names


def _is_trained(adapter: Adapter, name: str) -> bool:
    """Return whether a tensor of the base may have been trained without being saved by name."""
    path, _, leaf = name.rpartition(".")
    if leaf == "bias":
        trained: str = adapter.option("bias", str, "none")
        return trained != "none"
    is_embedding = path.rpartition(".")[2] in _EMBEDDINGS
    return leaf == "weight" and is_embedding


def _require_whole_modules(adapter: Adapter) -> None:
    """See that a saved module has all the tensors that the base has of it."""
    names, aliases = adapter.architecture.names, adapter.architecture.aliases
    places = {_in_model(adapter, name) for name in adapter.keys.whole}
    tensors = {names.get(place) for place in places - aliases}
    for place, tensor in names.items():
        is_held = place in places or (place not in aliases and tensor in tensors)
        own = adapter.place.to_adapter(place)
        if own is not None and not is_held and is_saved(own, adapter.config):
            raise BaseMismatchError(
                f"{adapter.path} has {own} in its modules_to_save, but holds no such tensor",
                fix="save the adapter again with its own configuration",
            )


def _config(adapter: Adapter, tensors: Mapping[str, RawTensor], new: list[str]) -> dict[str, Any]:
    """Return what a new head or a longer vocabulary changes in the base's `config.json`.

    Raises:
        BaseMismatchError: a tensor has another shape than the base's in any other way.
    """
    architecture = adapter.architecture
    config: dict[str, Any] = {}
    if new and architecture.is_adapted:
        config["architectures"] = [type(architecture.module).__name__]
    resized = _resized(adapter, tensors)
    for place, (before, after) in resized.items():
        if place.rpartition(".")[0].endswith(tuple(_EMBEDDINGS)):
            if architecture.config.get("vocab_size") != before:
                raise _misfit(adapter, place, tensors[place])
            config["vocab_size"] = after
    config |= _labels(adapter, tensors, new, resized)
    return {k: value for k, value in config.items() if architecture.config.get(k) != value}


def _resized(adapter: Adapter, tensors: Mapping[str, RawTensor]) -> dict[str, tuple[int, int]]:
    """Return the tensors that have more or fewer rows than the base's: (before, after).

    All tensors of a module must be resized alike: a head's weight and its bias.
    """
    names, resized = adapter.architecture.names, {}
    for place, tensor in tensors.items():
        shape = adapter.base.info(names[place]).shape if place in names else tensor.shape
        if tensor.shape == shape:
            continue
        if not shape or len(tensor.shape) != len(shape) or tensor.shape[1:] != shape[1:]:
            raise _misfit(adapter, place, tensor)
        resized[place] = (shape[0], tensor.shape[0])
    for place, rows in resized.items():
        front = f"{place.rpartition('.')[0]}."
        for other in (name for name in names if name.startswith(front)):
            shape = adapter.base.info(names[other]).shape
            if shape[:1] == rows[:1] and resized.get(other) != rows:
                raise _misfit(adapter, place, tensors[place])
    return resized


def _misfit(adapter: Adapter, place: str, tensor: RawTensor) -> BaseMismatchError:
    shape = adapter.base.info(adapter.architecture.names[place]).shape
    return BaseMismatchError(
        f"the adapter holds its own {place} {tensor.shape}, the base's is {shape}",
        fix="give the base that it was trained on, with the same vocabulary and labels",
    )


def _labels(
    adapter: Adapter,
    tensors: Mapping[str, RawTensor],
    new: list[str],
    resized: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """Return tables of as many labels as a head has rows; nobody says what they are called."""
    module = adapter.architecture.module
    if module is None:
        return {}
    labels = module.config.num_labels
    state = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    rows = {
        tensors[name].shape[0]
        for name in (*new, *resized)
        if state.get(name, ())[:1] == (labels,) and len(tensors[name].shape) == 2
    }
    if len(rows) != 1 or (count := rows.pop()) == labels:
        return {}
    table = {str(index): f"LABEL_{index}" for index in range(count)}
    return {"id2label": table, "label2id": {label: int(i) for i, label in table.items()}}
