"""Write the `config.json` of a merged folder, so that its Auto class opens it with right labels.

A new head needs another class and other labels than the base's configuration names. They come from
the manifest's `config`, or from the tuned model's own folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.errors import InputError
from kilodelta.files import plain
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.source import CHUNK
from kilodelta.files.tensor import Bytes
from kilodelta.format.delta import Delta
from kilodelta.format.model_config import apply_config
from kilodelta.models import layer_names

NAME, KEY = "config.json", "tie_word_embeddings"
LIMIT = 16 << 20
"""Bytes of a configuration that are read; one with 21,000 labels takes 2 MB."""


def read_given(path: Path) -> dict[str, Any]:
    """Read a tuned model's configuration, given as its folder or as the file itself.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    place = path / NAME if path.is_dir() else path
    if not place.is_file():
        raise InputError(
            f"{place} is not a configuration file", fix="give the tuned model's folder"
        )
    config = read_json(place)
    if config is None:
        raise InputError(
            f"{place} is no JSON object of at most {LIMIT} bytes",
            fix="give the config.json that save_pretrained wrote beside the tuned model",
        )
    return config


def write_config(
    stage: Path, base: Checkpoint, delta: Delta, given: Mapping[str, Any] | None
) -> str:
    """Complete the configuration in a merged folder, which holds a copy of the base's.

    A file that needs no change stays byte for byte what it was.

    Args:
        stage: the merged folder.
        base: the base.
        delta: bound to the base.
        given: the tuned model's configuration, which replaces the base's whole.

    Returns:
        Where the configuration comes from: `base`, `delta` or `given`; empty where there is none.
    """
    before = read_json(stage / NAME)
    if given is not None:
        config, source = dict(given), "given"
    elif before is None:
        return "base" if (stage / NAME).exists() else ""
    else:
        config = apply_config(before, delta.manifest.config)
        source = "delta" if delta.manifest.config else "base"
    if unties(base, delta, config):
        config = _untied(config)
    if config != before:
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (stage / NAME).write_text(text, encoding="utf-8")
    return source


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a configuration; None where it is missing, too large or no JSON object."""
    try:
        config = json.loads(plain.read_model_file(path, LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def unties(base: Checkpoint, delta: Delta, config: Mapping[str, Any]) -> bool:
    """Return whether the merged model holds an output head that is no longer its input embedding.

    Transformers 4 ties the two even if the files hold both, unless the configuration says
    otherwise; PEFT says otherwise when it merges such a model.

    Args:
        base: the base.
        delta: bound to the base.
        config: the merged model's configuration.
    """
    text = _text_config(config)
    rows = text.get("vocab_size", config.get("vocab_size"))
    if type(rows) is not int or not _ties(config):
        return False
    shapes = {name: base.info(name).shape for name in base.names}
    shapes |= {name: extra.shape for name, extra in delta.extras.items()}
    sized = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == rows]
    tables = [name for name in sized if layer_names.is_embedding(name)]
    heads = [n for n in sized if not layer_names.is_embedding(n) and not _is_in_a_layer(n)]
    return any(
        shapes[head] == shapes[table] and _differ(base, delta, head, table)
        for head in heads
        for table in tables
    )


def _is_in_a_layer(name: str) -> bool:
    """Return whether a tensor belongs to a numbered layer, whose widths may be the vocabulary's.

    The number before the last part is that of a head among several (`lm_heads.0.weight`).
    """
    return any(part.isdecimal() for part in name.split(".")[:-2])


def _differ(base: Checkpoint, delta: Delta, one: str, other: str) -> bool:
    """Return whether the merged values of two tensors of one shape differ because of the delta."""
    if not {one, other} & {*delta.extras, *delta.tensors}:
        return False
    if {one, other} & set(delta.tensors):
        return True  # two updates, or an update and none, are never the same
    chunks = (_chunks(base, delta, name) for name in (one, other))
    return any(
        left is None or right is None or not np.array_equal(left, right)
        for left, right in zip_longest(*chunks)
    )


def _chunks(base: Checkpoint, delta: Delta, name: str) -> Iterator[Bytes]:
    if name not in delta.extras:
        return base.tensor(name).chunks()
    data = delta.extras[name].data
    return (data[start : start + CHUNK] for start in range(0, data.size, CHUNK))


def _ties(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration leaves embeddings tied: it says so, or says nothing."""
    stated = [table[KEY] for table in (config, _text_config(config)) if table.get(KEY) is not None]
    return not stated or any(stated)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    untied = {**config, KEY: False}
    if isinstance(config.get("text_config"), dict):
        untied["text_config"] = {**config["text_config"], KEY: False}
    return untied
