"""Which settings of an adapter are obeyed, which are harmless, and which are refused.

PEFT adds settings with every release, and passing over one could give a wrong model. So a setting
that is not known to be harmless is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

from kilodelta.compress.adapters.peft.config import AdapterConfig
from kilodelta.compress.adapters.peft.sites import AdapterSite
from kilodelta.errors import InputError

HARMLESS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"}
    | {"peft_version", "megatron_config", "megatron_core", "loftq_config", "eva_config"}
    | {"corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "velora_config"}
    | {"lora_dropout", "vera_dropout", "randlora_dropout", "unilora_dropout", "init_weights"}
    | {"d_initial", "init_theta_d_bound"}
)
"""They affect training only, not the value of a trained update, so any value is accepted."""
COMMON = frozenset(
    {"peft_type", "r", "target_modules", "exclude_modules", "modules_to_save", "bias"}
    | {"layers_to_transform", "layers_pattern", "fan_in_fan_out"}
)
OBEYED: Mapping[str, frozenset[str]] = {
    "LORA": frozenset(
        {"lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias"}
        | {"init_lora_weights", "target_parameters", "ensure_weight_tying"}
    ),
    "RANDLORA": frozenset(
        {"randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse"}
    ),
    "UNILORA": frozenset({"proj_seed", "theta_d_length", "save_indices"}),
    "VERA": frozenset({"projection_prng_key", "save_projection"}),
}
"""`peft_type` to the settings that its reader obeys, besides the common ones."""

KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA do not."""

REASONS: Mapping[str, str] = {
    "use_dora": "DoRA rescales the whole weight by its columns' norms, so its update is no product"
    " of two factors",
    "trainable_token_indices": "single rows of an embedding have no place in a LoRA delta",
    "layer_replication": "the adapted model repeats the base's layers, each copy with an update of"
    " its own, so no file of the base's layout can hold it",
    "use_qalora": "QALoRA pools its inputs, so its update is no product of two factors",
    "alora_invocation_tokens": "an activated LoRA works on some tokens only, so it has no merge",
    "kasa_config": "KaSA cuts singular values off the base's own weights, so the adapter belongs to"
    " a changed base",
}
_FIX = "merge it with PEFT (merge_and_unload, save_pretrained) and run kilodelta compress"


def check_settings(config: AdapterConfig) -> None:
    """Refuse settings that would change the update in a way that is not known here.

    Raises:
        InputError: naming the setting.
    """
    understood = HARMLESS | COMMON | OBEYED[str(config.values.get("peft_type"))]
    for name, value in config.values.items():
        if name not in understood and value not in (None, False, 0, "", [], {}):
            why = REASONS.get(name, "it is not known here what that does to the update")
            raise _refused(config, name, value, why)
    start = config.values.get("init_lora_weights", True)
    if not isinstance(start, (bool, str, type(None))) or start not in KEEPS_BASE:
        why = "such an adapter belongs to a changed base"
        raise _refused(config, "init_lora_weights", start, why)


def _refused(config: AdapterConfig, name: str, value: Any, why: str) -> InputError:
    return InputError(f"{config.where}: {name} is {value!r:.60}, and {why}", fix=_FIX)


def rank_of(config: AdapterConfig, site: AdapterSite) -> int:
    """Return r of a site: its own by `rank_pattern`, else the adapter's.

    Raises:
        InputError: it is no positive whole number.
    """
    rank = _by_pattern(config, "rank_pattern", site.pattern_path, None)
    if rank is None:
        return config.rank
    if type(rank) is not int or rank < 1:
        raise InputError(
            f"{config.where}: the rank of {site.pattern_path} is {rank!r:.40}",
            fix="a rank is a positive whole number",
        )
    return rank


def scaling_of(config: AdapterConfig, site: AdapterSite) -> float:
    """Return alpha / r of a site, or alpha / sqrt(r) with rank-stabilised scaling.

    Raises:
        InputError: alpha is no finite number.
    """
    default = config.option("lora_alpha", (int, float), 8)
    alpha = _by_pattern(config, "alpha_pattern", site.pattern_path, default)
    if type(alpha) not in (int, float) or not abs(alpha) <= 1e30:
        raise InputError(
            f"{config.where}: alpha of {site.pattern_path} is {alpha!r:.40}",
            fix="alpha is a number of usual size",
        )
    rank = rank_of(config, site)
    return float(alpha / (sqrt(rank) if config.option("use_rslora", bool, False) else rank))


def _by_pattern(config: AdapterConfig, name: str, path: str, default: Any) -> Any:
    """Return the value of the first expression that matches the path, or its end after a dot."""
    for pattern, value in (config.option(name, (dict, type(None))) or {}).items():
        if config.expressions.begins(rf"(.*\.)?({pattern})$", pattern, path):
            return value
    return default
