"""Find how many tokens a model's positions suffice for."""

from __future__ import annotations

from typing import Any

from torch import nn

_FIELDS = ("max_position_embeddings", "n_positions", "max_target_positions")


def limit(module: nn.Module) -> int | None:
    """Return the longest text in tokens that the position table of a transformers module takes.

    RoBERTa's relatives number positions from their padding index + 1 on, so that many rows of
    their table are never reached (`create_position_ids_from_input_ids` in transformers).

    Args:
        module: any module; None is returned for one without a transformers configuration.
    """
    stated = _stated(getattr(module, "config", None))
    if stated is None:
        return None
    return stated - max((skipped(table) for table in _tables(module)), default=0)


def skipped(table: nn.Embedding) -> int:
    """Return how many rows of a position table come before that of the first token."""
    return 0 if table.padding_idx is None else table.padding_idx + 1


def _stated(config: Any) -> int | None:
    """The number of positions that a configuration states, its text model's where it has one."""
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for owner in (text, config):
        for field in _FIELDS:
            value = getattr(owner, field, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _tables(module: nn.Module) -> list[nn.Embedding]:
    return [
        table
        for name, table in module.named_modules()
        if isinstance(table, nn.Embedding) and name.endswith("position_embeddings")
    ]
