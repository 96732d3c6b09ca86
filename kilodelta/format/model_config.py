"""The manifest's `config`: what a fine-tune changed in its base's `config.json`, as inert JSON.

A new head, other labels or a longer vocabulary need another class, other names or another size
than the base's configuration states. These travel by their names in `config.json`; nothing in them
is run, imported or fetched (docs/format.md, section 3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

from kilodelta.files import canonical
from kilodelta.files.untrusted import MAX_TEXT, FieldError, text

MAX_BYTES = 64 << 10
"""Bytes of the whole object as canonical JSON."""
MAX_DEPTH = 4
"""Objects and lists inside each other, the outermost one counted."""
MAX_ARCHITECTURES = 16
FORBIDDEN = frozenset(
    {"auto_map", "custom_pipelines", "quantization_config", "dtype", "torch_dtype"}
)
"""Keys that make a loader import code, or read the weights as something that they are not."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,127}\Z")
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}\Z")
_INDEX = re.compile(r"(?:0|[1-9][0-9]{0,5})\Z")


def parse_config(value: Any) -> Mapping[str, Any]:
    """Check the `config` of a manifest that nobody vouches for.

    Args:
        value: the parsed JSON.

    Returns:
        The same object.

    Raises:
        FieldError: it is no object, empty, too large or too deep, or a key is one that a loader
            would act on; `architectures` and the label tables have the shapes that transformers
            writes.

    Example:
        >>> parse_config({"architectures": ["BertForSequenceClassification"]})
        {'architectures': ['BertForSequenceClassification']}
    """
    if not isinstance(value, dict) or not value:
        raise FieldError("config is not an object with at least one key")
    size = len(canonical.dumps(value).encode("utf-8"))
    if size > MAX_BYTES:
        raise FieldError(f"config takes {size} bytes; at most {MAX_BYTES} are allowed")
    _check_settings(value, "config", 1)
    return value


def apply_config(base: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Compute the `config.json` of a merged model.

    Args:
        base: the base's `config.json`.
        config: the manifest's `config`; each of its keys replaces the base's key whole.

    Returns:
        The keys of both. Where the labels are replaced, `label2id` is made of them unless it is
        given, and a count of labels that the base states beside its tables goes: transformers
        refuses a configuration in which they disagree.

    Example:
        >>> apply_config({"num_labels": 2, "hidden_size": 8}, {"id2label": {"0": "yes"}})
        {'hidden_size': 8, 'id2label': {'0': 'yes'}, 'label2id': {'yes': 0}}
    """
    replaced = dict(config)
    if "id2label" in config:
        turned = {label: int(number) for number, label in config["id2label"].items()}
        replaced.setdefault("label2id", turned)
    stale = {"num_labels", "_num_labels"} if "id2label" in config else set()
    return {key: value for key, value in base.items() if key not in stale} | replaced


def _check_settings(table: dict[str, Any], where: str, depth: int) -> None:
    """Check an object of settings; its keys are names of a configuration."""
    for key, item in table.items():
        if not _NAME.match(key) or key in FORBIDDEN:
            raise FieldError(f"{where} has a key {key!r:.80}, which is not allowed there")
        place = f"{where}.{key}"
        if key in _SHAPES:
            _SHAPES[key](item, place)
        elif isinstance(item, dict):
            _check_depth(place, depth + 1)
            _check_settings(item, place, depth + 1)
        else:
            _check_value(item, place, depth)


def _check_value(value: Any, where: str, depth: int) -> None:
    """Check what is no object of settings: a scalar, or a list of values."""
    if isinstance(value, list):
        _check_depth(where, depth + 1)
        for item in value:
            _check_value(item, where, depth + 1)
    elif isinstance(value, dict):
        _check_depth(where, depth + 1)
        _check_settings(value, where, depth + 1)
    elif isinstance(value, str):
        text(value, where)
    elif isinstance(value, float):
        if not isfinite(value):
            raise FieldError(f"{where} is not finite")
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise FieldError(f"{where} is not a 64-bit integer")


def _check_depth(where: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FieldError(f"{where} is nested more than {MAX_DEPTH} deep")


def _check_architectures(value: Any, where: str) -> None:
    names = value if isinstance(value, list) else []
    right = all(isinstance(name, str) and _CLASS.match(name) for name in names)
    if not right or not 1 <= len(names) <= MAX_ARCHITECTURES:
        raise FieldError(f"{where} is not a list of 1 to {MAX_ARCHITECTURES} names of classes")


def _check_id2label(value: Any, where: str) -> None:
    if not isinstance(value, dict) or not all(map(_INDEX.match, value)):
        raise FieldError(f"{where} is not an object whose keys are label numbers")
    for label in value.values():
        text(label, where)


def _check_label2id(value: Any, where: str) -> None:
    numbers = value.values() if isinstance(value, dict) else [None]
    if not all(type(number) is int and 0 <= number < 1 << 20 for number in numbers):
        raise FieldError(f"{where} is not an object from labels to their numbers")
    if any(len(label) > MAX_TEXT for label in value):
        raise FieldError(f"{where} has a label of more than {MAX_TEXT} characters")


_SHAPES = {
    "architectures": _check_architectures,
    "id2label": _check_id2label,
    "label2id": _check_label2id,
}
"""Keys whose values have a shape of their own."""
