"""Build the class of a model without weights, from its `config.json`, within limits.

Torch's meta device allocates nothing for a weight, but every layer is an object, so a configuration
of a few bytes could ask for millions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.models.asked_size import FACTOR, LAYERS, asked_modules
from kilodelta.models.quiet import quiet

_TASKS: Mapping[str, str] = {
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
}
"""PEFT's `task_type` to transformers' table of classes."""


def build_skeleton(folder: Path, adapter: Mapping[str, Any], tensors: int) -> tuple[Any, bool]:
    """Build the model that an adapter was trained on, on the meta device.

    Args:
        folder: the base's folder, with its `config.json`; no code of it is run.
        adapter: the adapter's configuration, whose `auto_mapping` and `task_type` tell the class
            that was adapted where it is another than the base's own.
        tensors: how many tensors the base has, which bounds what is built.

    Returns:
        The module in eval mode, and whether the adapter names its class; (None, False) where no
        class can be built.
    """
    try:
        import torch
        import transformers
    except ModuleNotFoundError:
        return None, False
    if not _is_modest(folder, tensors):
        return None, False
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception:  # a strange configuration may raise anything in transformers' own code
            return None, False
        for kind, is_adapted in _classes(transformers, config, adapter):
            try:
                with torch.device("meta"), torch.random.fork_rng(devices=[]):
                    return kind(config).eval(), is_adapted
            except Exception:  # a class that this configuration does not fit
                continue
    return None, False


def _is_modest(folder: Path, tensors: int) -> bool:
    """Return whether a configuration asks for no more modules than the base can have tensors of."""
    asked = asked_modules(folder)
    most = max(FACTOR * tensors, LAYERS)
    return asked is not None and all(layers * experts <= most for layers, experts in asked)


def _classes(transformers: Any, config: Any, adapter: Mapping[str, Any]) -> list[tuple[Any, bool]]:
    """List the classes to try, and whether the adapter names them."""
    mapping = adapter.get("auto_mapping")
    adapted = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    table = _TASKS.get(str(adapter.get("task_type")))
    named = getattr(config, "architectures", None)
    own = named[:1] if isinstance(named, list) else []
    listed = [
        (getattr(transformers, str(adapted), None), True),
        (_from_table(transformers, table, config), True),
        *((getattr(transformers, str(name), None), False) for name in own),
        (_from_table(transformers, "MODEL_MAPPING", config), False),
    ]
    return [
        (kind, is_adapted)
        for kind, is_adapted in listed
        if isinstance(kind, type)
        and issubclass(kind, transformers.PreTrainedModel)
        and isinstance(config, getattr(kind, "config_class", None) or ())
    ]


def _from_table(transformers: Any, table: str | None, config: Any) -> Any:
    mapping = getattr(transformers, table, None) if table else None
    try:
        kind = mapping.get(type(config), None) if mapping is not None else None
    except Exception:  # a table names a class whose module needs what is not installed
        return None
    return kind[0] if isinstance(kind, (tuple, list)) else kind
