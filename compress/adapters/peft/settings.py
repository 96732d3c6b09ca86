"""What a LoRA configuration may say here: settings that change an update are obeyed or refused.

PEFT adds settings with every release, and one that is passed over would be a wrong model. So what
is not known to be harmless is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import sqrt
from typing import Any

from kilodelta.compress.adapters.peft.folder import CONFIG, Adapter
from kilodelta.errors import InputError

OBEYED = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias"}
    | {"fan_in_fan_out", "init_lora_weights"}
)
"""Read here; the tensors themselves are what `bias`, `modules_to_save` and the like made them."""
HARMLESS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"}
    | {"peft_version", "target_modules", "exclude_modules", "layers_to_transform"}
    | {"layers_pattern", "modules_to_save", "bias", "lora_dropout", "ensure_weight_tying"}
    | {"megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config"}
    | {"lora_ga_config", "qalora_group_size", "runtime_config", "velora_config"}
)
"""They choose what is trained, or how, and change no update that is."""
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA do not."""

REASONS: Mapping[str, str] = {
    "use_dora": "DoRA rescales the whole weight by its columns' norms, so its update is no product"
    " of two factors",
    "trainable_token_indices": "single rows of an embedding have no place in a LoRA delta",
    "target_parameters": "bare parameters, such as stacked experts, are not supported",
    "layer_replication": "the base has other layers than the adapted model",
    "use_qalora": "QALoRA pools its inputs, so its update is no product of two factors",
    "alora_invocation_tokens": "an activated LoRA works on some tokens only, so it has no merge",
}
_FIX = "merge it with PEFT (merge_and_unload, save_pretrained) and run kilodelta compress"


def check_settings(adapter: Adapter) -> None:
    """Refuse what would change the update in a way that is not known here.

    Raises:
        InputError: naming the setting.
    """
    for name, value in adapter.config.items():
        if name not in OBEYED | HARMLESS and value not in (None, False, 0, "", [], {}):
            why = REASONS.get(name, "it is not known here what that does to the update")
            raise _refused(adapter, name, value, why)
    start = adapter.config.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        raise _refused(
            adapter, "init_lora_weights", start, "such an adapter belongs to a changed base"
        )


def _refused(adapter: Adapter, name: str, value: Any, why: str) -> InputError:
    return InputError(f"{adapter.path / CONFIG}: {name} is {value!r:.60}, and {why}", fix=_FIX)


def rank_of(adapter: Adapter, path: str) -> int:
    """r of a module: its own by `rank_pattern`, else the adapter's.

    Raises:
        InputError: it is no positive whole number.
    """
    found = _by_pattern(adapter, "rank_pattern", path, adapter.rank)
    if type(found) is not int or found < 1:
        raise InputError(
            f"{adapter.path / CONFIG}: the rank of {path} is {found!r:.40}",
            fix="a rank is a positive whole number",
        )
    return found


def scaling_of(adapter: Adapter, path: str) -> float:
    """alpha / r of a module, or alpha / sqrt(r) with rank-stabilised scaling.

    Raises:
        InputError: alpha is no finite number.
    """
    default = adapter.option("lora_alpha", (int, float), 8)
    alpha = _by_pattern(adapter, "alpha_pattern", path, default)
    if type(alpha) not in (int, float) or not abs(alpha) < float("inf"):
        raise InputError(
            f"{adapter.path / CONFIG}: alpha of {path} is {alpha!r:.40}", fix="alpha is a number"
        )
    rank = rank_of(adapter, path)
    return float(alpha / (sqrt(rank) if adapter.option("use_rslora", bool, False) else rank))


def _by_pattern(adapter: Adapter, name: str, path: str, default: Any) -> Any:
    """PEFT's rule: the first expression that matches the path, or its end after a dot."""
    for pattern, value in (adapter.option(name, (dict, type(None))) or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error:
            raise InputError(
                f"{adapter.path / CONFIG}: {name} has {pattern!r:.80}, no regular expression",
                fix="give the configuration that PEFT wrote beside the adapter",
            ) from None
        if found:
            return value
    return default
