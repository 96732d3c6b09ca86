"""What llama.cpp calls the tensors of a model, and in which order it keeps their rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from kilodelta.errors import ExportError, require
from kilodelta.grid.layouts.gguf_blocks import interleaved

Matrix = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: `general.architecture` of the base's file.
        rotated: whether rows of q and k are interleaved there, as the llama architecture's are.
    """

    name: str
    rotated: bool


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture(name="llama", rotated=True),
    "mistral": GgufArchitecture(name="llama", rotated=True),
    "qwen2": GgufArchitecture(name="qwen2", rotated=False),
    "qwen3": GgufArchitecture(name="qwen3", rotated=False),
}
"""By `model_type` of `config.json`. Others are refused: a name that fits proves nothing of the
order of rows, and llama.cpp loads a wrong one without a word."""
QUERY, KEY = "attn_q.weight", "attn_k.weight"


def architecture_of(config: Mapping[str, Any]) -> GgufArchitecture:
    """Return the architecture of a Hugging Face configuration.

    Raises:
        ExportError: it is none of those that are known to be right.
    """
    kind = str(config.get("model_type", ""))
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"{kind or 'a model without config.json'!r:.60} is not exported to GGUF",
            fix=f"known are {', '.join(ARCHITECTURES)}; for others kilodelta export-peft, and "
            "llama.cpp's own convert_lora_to_gguf.py",
        )
    return ARCHITECTURES[kind]


class Naming:
    """Names tensors of one model; built from its configuration, without its weights."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        gguf = require("gguf", extra="gguf", why="write GGUF files")
        self.architecture = architecture_of(config)
        self._heads = {
            QUERY: _whole(config, "num_attention_heads"),
            KEY: _whole(config, "num_key_value_heads", "num_attention_heads"),
        }
        kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        layers = _whole(config, "num_hidden_layers")
        self._map = gguf.get_tensor_name_map(kinds[self.architecture.name], layers)

    def name(self, tensor: str) -> str:
        """Return llama.cpp's name of a layer's matrix, such as `blk.0.attn_q.weight`.

        Raises:
            ExportError: it has none, or one that an adapter cannot carry (embeddings, norms).
        """
        theirs: str | None = self._map.get_name(tensor, try_suffixes=(".weight",))
        if theirs is None or not theirs.startswith("blk.") or "norm" in theirs:
            raise ExportError(
                f"{tensor} has no place in a GGUF adapter, which holds layers' matrices alone",
                fix="leave it out: kilodelta compress --exclude, or merge and convert the model",
            )
        return theirs

    def ordered(self, name: str, B: Matrix) -> Matrix:
        """Return B (out, r) with its rows in llama.cpp's order.

        The llama architecture interleaves the two halves of each head's rotary dimensions, so the
        rows of q and k stand in another order than in Hugging Face's files.

        Args:
            name: llama.cpp's name of the tensor.
            B: the left factor, (out, r).

        Raises:
            ExportError: the rows do not divide into the configuration's heads.
        """
        kind = name.split(".", 2)[2]
        if not self.architecture.rotated or kind not in self._heads:
            return B
        out = B.shape[0]
        heads = self._heads[kind]
        if out % (2 * heads):
            raise ExportError(
                f"{name} has {out} rows, which are not {heads} heads of an even width",
                fix="config.json and weights are of different models",
            )
        ordered: Matrix = B[interleaved(out, heads)]
        return ordered


def _whole(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if type(value) is int and 0 < value < 1 << 20:
            return value
    raise ExportError(
        f"config.json has no {keys[0]}", fix="give the model folder with its config.json"
    )
