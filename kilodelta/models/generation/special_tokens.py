"""Find the ids that begin, end and pad the texts of a generating model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError, InputError
from kilodelta.files import plain
from kilodelta.models.loaded import LoadedModel

_FILE = "generation_config.json"
_IDS = 1 << 31
"""Token ids that a vocabulary may have."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens with a meaning for generation.

    Attributes:
        begin: of a text.
        end: each of these ends one.
        pad: fills the rows of a batch.
    """

    begin: int
    end: tuple[int, ...]
    pad: int


def special_tokens(loaded: LoadedModel, folder: Path) -> SpecialTokens:
    """Find a model's special tokens: in `generation_config.json`, its configuration, its tokenizer.

    Args:
        loaded: the model.
        folder: the model's; a file has no generation configuration beside it.

    Raises:
        InputError: nothing says which token ends a text.
        CheckpointError: `generation_config.json` cannot be read.
    """
    stated = _generation_config(folder)
    end = _ids(_first("eos_token_id", stated, loaded))
    if not end:
        raise InputError(
            f"{loaded.source} does not say which token ends a text",
            fix="write eos_token_id into its generation_config.json",
        )
    begin = _ids(_first("bos_token_id", stated, loaded)) or end
    pad = _ids(_first("pad_token_id", stated, loaded)) or end
    return SpecialTokens(begin=begin[0], end=end, pad=pad[0])


def _generation_config(folder: Path) -> Mapping[str, Any]:
    place = folder / _FILE
    if not place.exists():
        return {}
    with plain.explained(place, CheckpointError):
        text = plain.read_model_file(place)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{place} is not JSON", fix="fetch the folder again") from None
    return value if isinstance(value, dict) else {}


def _first(name: str, stated: Mapping[str, Any], loaded: LoadedModel) -> Any:
    config = loaded.module.config.get_text_config()  # type: ignore[operator, union-attr]
    values = (stated.get(name), getattr(config, name, None), getattr(loaded.tokenizer, name, None))
    return next((value for value in values if value not in (None, [])), None)


def _ids(value: Any) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(n for n in listed if type(n) is int and 0 <= n < _IDS)
