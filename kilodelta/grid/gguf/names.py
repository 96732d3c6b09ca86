"""Read a GGUF file by the names and in the order of rows that Hugging Face's files have.

llama.cpp's converter renames tensors and, for the llama architecture, interleaves the rows of
queries and keys; both are undone here, so that a fine-tune made with Hugging Face's tools fits the
file as it lies. The architectures are those whose converter is known to do nothing else.

Source: llama.cpp's `convert_hf_to_gguf.py` and the `gguf` package's `TensorNameMap`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from kilodelta.errors import CheckpointError
from kilodelta.files.checkpoint import in_name_order
from kilodelta.grid.gguf.file import GgufSource
from kilodelta.grid.layouts.gguf_blocks import GgufBlocks, interleaved
from kilodelta.grid.model import QuantisedModel, Renamed, Stored

ROTATED: Mapping[str, bool] = MappingProxyType({"llama": True, "qwen2": False, "qwen3": False})
"""By `general.architecture`, whether rows of queries and keys are interleaved."""
_WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_HEADS = {"attn_q": "head_count", "attn_k": "head_count_kv"}
_FIX = "compress against the float model, whose file llama.cpp takes by kilodelta export-gguf"


def hugging_face_name(name: str) -> str | None:
    """Return Hugging Face's name of a tensor; None where these architectures have no such tensor.

    Example:
        >>> hugging_face_name("blk.7.attn_q.weight"), hugging_face_name("token_embd.weight")
        ('model.layers.7.self_attn.q_proj.weight', 'model.embed_tokens.weight')
    """
    stem, _, last = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{last}"
    found = _LAYER.fullmatch(name)
    if found is None or found[2] not in _IN_LAYER:
        return None
    return f"model.layers.{found[1]}.{_IN_LAYER[found[2]]}.{found[3]}"


def by_hugging_face(model: QuantisedModel) -> QuantisedModel:
    """Return the model of a GGUF file under Hugging Face's names.

    The stored tensors, and the root over them, stay those of the file; the logical root is that of
    the weights under their new names, as any other layout of the same numbers has it.

    Args:
        model: opened from a `.gguf` file, with the file's own names.

    Raises:
        CheckpointError: the architecture is none whose converter is known, or the file has tensors
            that it does not name.
    """
    source = model.source
    assert isinstance(source, GgufSource)  # callers look
    kind = source.values.get("general.architecture")
    if kind not in ROTATED:
        raise CheckpointError(
            f"{model.path} is of the architecture {kind!r:.60}, whose tensors have no names in"
            f" Hugging Face's files that are known; these have: {', '.join(ROTATED)}",
            fix=_FIX,
        )
    stored = [_weight(model, weight) for weight in model.stored.values()]
    renamed = {_name(model, place): _renamed(model, place) for place in model.plain}
    by_name = {weight.name: weight for weight in stored}
    return replace(
        model,
        config={**model.config, "names": "huggingface"},
        stored={name: by_name[name] for name in in_name_order(by_name)},
        plain=in_name_order(renamed),
        renamed=MappingProxyType(renamed),
    )


def _name(model: QuantisedModel, place: str) -> str:
    if place == "rope_freqs.weight":  # computed from the configuration, and in no checkpoint
        return place
    name = hugging_face_name(place)
    if name is None:
        raise CheckpointError(
            f"{model.path} has a tensor {place!r:.200} that has no name in Hugging Face's files"
            " which is known",
            fix=_FIX,
        )
    return name


def _weight(model: QuantisedModel, weight: Stored) -> Stored:
    layout = weight.layout
    assert isinstance(layout, GgufBlocks)  # a GGUF file has no other
    heads = _heads(model, weight.name, weight.shape[0])
    return Stored(
        name=_name(model, weight.name), layout=replace(layout, heads=heads), parts=weight.parts
    )


def _renamed(model: QuantisedModel, place: str) -> Renamed:
    rows = model.source.info(place).shape[0]
    heads = _heads(model, place, rows)
    return Renamed(place=place, rows=interleaved(rows, heads) if heads else None)


def _heads(model: QuantisedModel, place: str, rows: int) -> int:
    """Return of how many heads a tensor's rows are interleaved; 0 if they are not."""
    source = model.source
    assert isinstance(source, GgufSource)  # callers look
    kind, found = str(source.values["general.architecture"]), _LAYER.fullmatch(place)
    if not ROTATED[kind] or found is None or found[2] not in _HEADS:
        return 0
    key = f"{kind}.attention.{_HEADS[found[2]]}"
    heads = source.values.get(key, source.values.get(f"{kind}.attention.head_count"))
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise CheckpointError(
            f"{place} of {model.path} has {rows} rows, and {key} is {heads!r:.40}: these are not"
            " heads of an even width",
            fix="the file is damaged, or was written by another converter: fetch it again",
        )
    return heads
