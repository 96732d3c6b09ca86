"""sentence-transformers folders: what `modules.json` says about pooling.

Source: https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.models.heads import Pooling

_LEGACY = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_FIX = "remove modules.json from a copy of the folder to take the token states as they are"


def read_pooling(folder: Path) -> Pooling | None:
    """How the folder pools; None where it is not a sentence-transformers folder.

    Raises:
        InputError: it holds a module other than Transformer, Pooling and Normalize, or pools in
            another way than mean, cls or lasttoken.
    """
    modules = _read(folder / "modules.json", [])
    if not modules:
        return None
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(f"{folder} chains {', '.join(kinds)}, which is not supported", fix=_FIX)
    options = _read(folder / str(modules[1].get("path", "")) / "config.json", {})
    mode = _mode(options)
    if mode not in ("mean", "cls", "lasttoken"):
        raise InputError(f"{folder} pools by {mode}, which is not supported", fix=_FIX)
    return Pooling(mode=mode, normalise=len(kinds) == 3)  # type: ignore[arg-type]


def read_max_length(folder: Path) -> int | None:
    """The number of tokens that the folder cuts texts to, where it says so."""
    limit = _read(folder / "sentence_bert_config.json", {}).get("max_seq_length")
    return limit if isinstance(limit, int) else None


def _mode(options: dict[str, Any]) -> str:
    """The pooling mode, of today's configuration or of the older one with a flag per mode."""
    stated = options.get("pooling_mode")
    if stated is None:
        stated = [mode for key, mode in _LEGACY.items() if options.get(key)]
    return stated if isinstance(stated, str) else "+".join(map(str, stated))


def _read(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", fix="fetch the folder again") from None
    if type(found) is not type(default):
        raise InputError(f"{path} does not hold what it should", fix="fetch the folder again")
    return found
