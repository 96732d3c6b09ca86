"""Find the folder whose `config.json` describes a fine-tune, and open a base in that shape.

A fine-tune may have another head than its base. Its configuration comes from the tuned model's
folder, or from the `.kd` file, which carries what differs from the base's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from kilodelta.errors import InputError
from kilodelta.export.merge.config import NAME, read_given, read_json
from kilodelta.files import safetensors, staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.staging.sidecars import copy_sidecars
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.format.model_config import apply_config
from kilodelta.models import LoadedModel, locate_delta, open_model

FIX = (
    "give --config, the tuned model's folder or a .kd file made of it, "
    "or --model package.module:function"
)


@contextmanager
def architecture(
    folder: Path, config: str | None = None, delta: Delta | None = None
) -> Iterator[Path]:
    """Yield a folder with the `config.json` and the tokenizer of a fine-tune.

    Args:
        folder: the base's.
        config: the tuned model's folder, its `config.json`, or a `.kd` file made of it.
        delta: where there is no `config`, what says how the base's configuration changes.

    Raises:
        InputError: nothing says what the architecture is.
        FileError: `config` is a damaged `.kd` file.
    """
    if config is not None and (Path(config) / NAME).is_file():
        yield Path(config)
        return
    changes: Mapping[str, object] = {} if delta is None else delta.manifest.config
    if config is not None and Path(config).suffix == ".kd":
        changes, config = load(locate_delta(config)).manifest.config, None
    if config is None and not (folder / NAME).is_file():
        raise InputError(f"{folder} holds no config.json", fix=FIX)
    if config is None and not changes:
        yield folder
        return
    own = read_json(folder / NAME) or {}
    given = apply_config(own, changes) if config is None else read_given(Path(config))
    left_out = {NAME}
    if given.get("architectures") != own.get("architectures"):
        left_out.add("modules.json")  # pools the base's token states; another head takes logits
    with staging.scratch() as stage:
        copy_sidecars(folder, stage, frozenset(left_out))
        (stage / NAME).write_text(json.dumps(given), encoding="utf-8")
        yield stage


@dataclass(frozen=True, kw_only=True)
class HeadedBase:
    """A base in the architecture of its fine-tunes, for graphs that are made once for all."""

    loaded: LoadedModel
    """Its `names` hold the heads' tensors too, under their state names."""

    weights: Checkpoint
    """The base's tensors and the heads'; only its values may be read, it has no identity."""

    heads: Mapping[str, RawTensor]
    """Tensors that every fine-tune brings, with values to start from: random, from seed 0."""


def open_headed(
    base: Checkpoint,
    *,
    config: str | None = None,
    delta: Delta | None = None,
    model: str | None = None,
) -> HeadedBase:
    """Open a base in the architecture of its fine-tunes.

    Args:
        base: what the fine-tunes were made of.
        config: as for `architecture`; by default the base's own, which needs no head.
        delta: as for `architecture`.
        model: `package.module:function` that builds the module, in its place.

    Raises:
        InputError: nothing says what the architecture is, or two things do.
        CheckpointError: the weights do not belong to it.

    Example:
        >>> open_headed(Checkpoint.open("base/"), config="tuned/").heads  # doctest: +SKIP
        {'classifier.bias': RawTensor(...), 'classifier.weight': RawTensor(...)}
    """
    if model and config:
        raise InputError("--model and --config both name an architecture", fix="give one of them")
    folder = base.shards[0].path.parent
    if model:
        loaded = open_model(model, weights=base)
    else:
        with architecture(folder, config, delta) as place:
            opened = open_model(place, weights=None if place == folder else base)
        loaded = replace(opened, source=str(folder))
    if not loaded.missing:
        return HeadedBase(loaded=loaded, weights=base, heads={})
    state = loaded.module.state_dict()
    heads = {name: RawTensor.copy_of(state[name]) for name in sorted(loaded.missing)}
    names = {**loaded.names, **{name: name for name in heads}}
    unused = tuple(name for name in loaded.unused if name not in heads)
    return HeadedBase(
        loaded=replace(loaded, names=names, missing=(), unused=unused),
        weights=_together(base, heads),
        heads=heads,
    )


def _together(base: Checkpoint, heads: Mapping[str, RawTensor]) -> Checkpoint:
    """Join both into one checkpoint; a head replaces the base tensor of its name."""
    with staging.scratch() as stage:
        safetensors.write(stage / "heads.safetensors", heads)
        added = Checkpoint.open(stage / "heads.safetensors")  # mapped, so it outlives its name
    return Checkpoint(base.path, (*base.shards, *added.shards), index=None)
