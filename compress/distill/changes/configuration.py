"""What a fine-tune changed in its base's `config.json`: class, labels, sizes.

Without it a merged model with a new head keeps the base's configuration, which names another class
(`kilodelta.format.model_config` says what may travel, and why).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.files.checkpoint import Checkpoint, read_config
from kilodelta.files.untrusted import FieldError
from kilodelta.format.model_config import FORBIDDEN, parse_config
from kilodelta.models.quiet import quiet

HEAD = ("architectures", "id2label", "label2id", "problem_type")
"""Keys that a head needs; all that travels over a base without a configuration."""
_ABOUT_FILES = frozenset(
    {"transformers_version", "use_cache", "gradient_checkpointing", "attn_implementation"}
)
"""Keys about how the files were written or are run, not about the model."""


def difference(base: Checkpoint, tuned: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Compare two models' configurations.

    Both are read with the defaults of their class where transformers knows it, so that a key which
    only one of the two files spells out is no difference.

    Args:
        base: the base model.
        tuned: the tuned model.

    Returns:
        The keys whose values in the tuned configuration differ, fit for a manifest; and the names
        of those that differ but may not travel, for their size or their shape. Nothing where the
        tuned model has no `config.json`.
    """
    before, after = read_config(base), read_config(tuned)
    if not after:
        return {}, ()
    if before:
        full = _with_defaults(before), _with_defaults(after)
        changed = {k: v for k, v in full[1].items() if k not in full[0] or full[0][k] != v}
    else:
        changed = {key: after[key] for key in HEAD if key in after}
    found = {key: value for key, value in changed.items() if _travels(key)}
    return _within_limits(_without_inverse(found))


def _travels(key: str) -> bool:
    return not key.startswith("_") and key not in FORBIDDEN | _ABOUT_FILES


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with every key of its class, as plain JSON; unchanged on failure."""
    try:
        import transformers

        kind = transformers.CONFIG_MAPPING[config["model_type"]]
        with quiet():
            return dict(json.loads(json.dumps(_clean(kind.from_dict(dict(config)).to_dict()))))
    except Exception:  # a class that transformers lacks, or whose code refuses these values
        return dict(_clean(config))


def _clean(value: Any) -> Any:
    """Leave out what must not travel from nested configurations as well."""
    if not isinstance(value, Mapping):
        return [_clean(item) for item in value] if isinstance(value, (list, tuple)) else value
    return {
        key: _clean(item)
        for key, item in value.items()
        if not isinstance(key, str) or not (key in FORBIDDEN or key == "transformers_version")
    }


def _without_inverse(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out `label2id` where it only turns `id2label` round: half of the labels' bytes."""
    labels = config.get("id2label")
    if isinstance(labels, dict):
        turned = {label: int(number) for number, label in labels.items()}
        if config.get("label2id") in (None, turned):
            return {key: value for key, value in config.items() if key != "label2id"}
    return config


def _within_limits(config: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Drop keys that a manifest may not hold, then the largest until the rest fits."""
    kept = {key: value for key, value in config.items() if _fits({key: value})}
    while kept and not _fits(kept):
        del kept[max(kept, key=lambda key: len(json.dumps(kept[key])))]
    if "id2label" in config and "id2label" not in kept:  # one table of two contradicts the base's
        kept.pop("label2id", None)
    return kept, tuple(sorted(set(config) - set(kept)))


def _fits(config: dict[str, Any]) -> bool:
    try:
        parse_config(config)
    except FieldError:
        return False
    return True


def traces_of_training(base: Path, tuned: Path) -> str:
    """Say which trace of training the base's folder has and the tuned one's lacks; empty if none.

    A base as published has none: the two models may have been exchanged.
    """
    for trace in ("training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt"):
        if (base / trace).is_file() and not (tuned / trace).is_file():
            return f"{base} holds {trace}, which training leaves behind"
    return ""
