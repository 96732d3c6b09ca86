"""Pool token states into one sentence embedding per row, as sentence-transformers does.

How a folder pools stands in its `modules.json` and in what that names.

Source: https://sbert.net/docs/package_reference/sentence_transformer/models.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kilodelta.errors import InputError
from kilodelta.files import canonical, plain, untrusted
from kilodelta.files.untrusted import FieldError


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """Turn token states (batch, tokens, width) into one embedding (batch, width)."""

    mode: Literal["mean", "cls", "lasttoken"]
    normalise: bool

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool `states` where `mask` (batch, tokens) is 1; padding has 0.

        The mean and the norm are computed in float32 in every precision, as sentence-transformers
        does: the smallest norm that it allows is below float16's smallest number.

        Example:
            >>> pool = Pooling(mode="mean", normalise=False)
            >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
            tensor([[2.]])
        """
        pooled = _POOL[self.mode](states, mask)
        if not self.normalise:
            return pooled
        return nn.functional.normalize(pooled.float(), dim=-1).to(pooled.dtype)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).float()
    summed = (states.float() * weights).sum(1)
    return (summed / weights.sum(1).clamp(min=1.0)).to(states.dtype)


def _cls(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (places * mask).argmax(1)
    return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]


_POOL = {"mean": _mean, "cls": _cls, "lasttoken": _last}

_LEGACY = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
"""Flags of older configurations to the modes that today's name."""
_FIX = "remove modules.json from a copy of the folder to take the token states as they are"
_FETCH = "fetch the folder again"


def read_pooling(folder: Path) -> Pooling | None:
    """Return how the folder pools; None where it is no sentence-transformers folder.

    Raises:
        InputError: it holds a module other than Transformer, Pooling and Normalize; pools in
            another way than mean, cls or lasttoken; or lacks the settings of its pooling.
    """
    place = folder / "modules.json"
    if not place.exists():
        return None
    modules = _modules(place)
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"{folder} chains {', '.join(kinds) or 'nothing'}, which is not supported", fix=_FIX
        )
    settings = folder / modules[1][1] / "config.json"
    if not settings.exists():
        raise InputError(f"{place} names {modules[1][1]}, but {settings} is missing", fix=_FETCH)
    mode = _mode(_read(settings))
    if mode not in ("mean", "cls", "lasttoken"):
        raise InputError(f"{settings} pools by {mode}, which is not supported", fix=_FIX)
    return Pooling(mode=mode, normalise=len(kinds) == 3)  # type: ignore[arg-type]


def read_max_length(folder: Path) -> int | None:
    """Return the number of tokens that the folder cuts texts to, where it says so."""
    place = folder / "sentence_bert_config.json"
    limit = _read(place).get("max_seq_length") if place.exists() else None
    return limit if type(limit) is int and limit > 0 else None


def _modules(place: Path) -> tuple[tuple[str, str], ...]:
    """Return the kind and the folder of every module."""

    def item(value: Any, where: str) -> tuple[str, str]:
        module = untrusted.mapping(value, where)
        kind = untrusted.text(module.get("type"), f"{where}.type").rpartition(".")[2]
        path = untrusted.text(module.get("path", ""), f"{where}.path")
        return kind, untrusted.file_name(path, f"{where}.path") if path else ""

    try:
        return untrusted.listed(_json(place), "it", item)
    except FieldError as error:
        raise InputError(f"{place}: {error}", fix=_FETCH) from None


def _mode(settings: Mapping[str, Any]) -> str:
    """Return the pooling mode, of today's configuration or of the older one with flags."""
    stated = settings.get("pooling_mode")
    if stated is None:
        stated = [mode for key, mode in _LEGACY.items() if settings.get(key)] or "nothing"
    return stated if isinstance(stated, str) else "+".join(map(str, stated))


def _read(place: Path) -> Mapping[str, Any]:
    settings = _json(place)
    if not isinstance(settings, dict):
        raise InputError(f"{place} holds no JSON object", fix=_FETCH)
    return settings


def _json(place: Path) -> Any:
    with plain.explained(place, InputError):
        text = plain.read_model_file(place)
    try:
        return canonical.loads(text)
    except canonical.NotCanonicalError as error:
        raise InputError(f"{place} is not JSON: {error}", fix=_FETCH) from None
