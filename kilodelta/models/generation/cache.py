"""Run a causal language model step by step, its key and value cache passed as plain tensors.

Names and layouts are those that ONNX Runtime GenAI feeds and reads by default
(https://onnxruntime.ai/docs/genai/reference/config.html):

===========================  ==========================================================
 `input_ids`                  int64 `(batch, sequence)`, the new tokens
 `attention_mask`             int64 `(batch, past_sequence + sequence)`
 `position_ids`               int64 `(batch, sequence)`, where the model takes them
 `past_key_values.N.key`      `(batch, key-value heads, past_sequence, head size)` of layer N
 `past_key_values.N.value`    the same of its values
 `logits`                     `(batch, sequence, vocabulary)`
 `present.N.key`, `.value`    the cache with the new tokens, for the next step
===========================  ==========================================================

transformers' own cache objects are not traced: the order of their tensors in an exported program
depends on which part of transformers was used first in the process.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from kilodelta.errors import ExportError, one_line
from kilodelta.models.loaded import Batch, LoadedModel
from kilodelta.models.quiet import quiet

T = TypeVar("T")

PAST, PRESENT = "past_key_values", "present"
"""What the names of a cache's tensors begin with, as inputs and as outputs."""

POSITIONS = "position_ids"


@dataclass(frozen=True, kw_only=True)
class CacheLayer:
    """The sizes of one layer's cache.

    Attributes:
        heads: key-value heads.
        key_size: numbers in each head of a key.
        value_size: numbers in each head of a value; the same in most models.
    """

    heads: int
    key_size: int
    value_size: int


class CachedStep(nn.Module):
    """A causal language model as a function from new tokens and a cache to logits and a cache.

    Args:
        module: a causal language model of transformers.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Compute `logits`, and `present.N.key` and `present.N.value` of every layer N.

        Args:
            batch: tensors under the names of the module's docstring.
        """
        from transformers import DynamicCache

        plain = {name: t for name, t in batch.items() if not name.startswith(f"{PAST}.")}
        count = (len(batch) - len(plain)) // 2
        pairs = [(batch[f"{PAST}.{n}.key"], batch[f"{PAST}.{n}.value"]) for n in range(count)]
        # Without a configuration every layer keeps all positions, sliding windows as well; their
        # masks limit what is attended to.
        result = self.module(**plain, past_key_values=DynamicCache(pairs), use_cache=True)
        named = {"logits": result.logits}
        for n, layer in enumerate(result.past_key_values.layers[:count]):
            named[f"{PRESENT}.{n}.key"] = layer.keys
            named[f"{PRESENT}.{n}.value"] = layer.values
        return named


def takes_positions(module: nn.Module) -> bool:
    """Tell whether the model takes `position_ids`; one that does not counts by itself."""
    return POSITIONS in inspect.signature(module.forward).parameters


def cache_layers(loaded: LoadedModel) -> tuple[CacheLayer, ...]:
    """Measure the cache of a causal language model, by running it on two tokens.

    Raises:
        ExportError: the model is no causal language model, or keeps something else between steps
            than keys and values of every position (a state-space model does).
    """
    from transformers import DynamicCache

    module = loaded.module
    if "past_key_values" not in inspect.signature(module.forward).parameters:
        raise _no_decoder(loaded, "takes no past_key_values")
    tokens = torch.zeros(1, 2, dtype=torch.long)
    try:
        with torch.no_grad(), quiet():
            result = module(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=DynamicCache(),
                use_cache=True,
            )
    except Exception as error:  # a module's own code may raise anything
        raise _no_decoder(loaded, f"does not run with a cache ({one_line(error)})") from error
    if getattr(result, "logits", None) is None or result.logits.ndim != 3:
        raise _no_decoder(loaded, "puts out no logits for every token")
    layers = getattr(getattr(result, "past_key_values", None), "layers", ())
    pairs = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in layers]
    held = [(k, v) for k, v in pairs if isinstance(k, Tensor) and isinstance(v, Tensor)]
    if not held or any(t.ndim != 4 or t.shape[2] != 2 for pair in held for t in pair):
        raise _no_decoder(loaded, "keeps something else than keys and values between steps")
    if held != pairs[: len(held)] or not _is_whole(loaded, held):
        raise _no_decoder(loaded, "keeps keys and values in some of its layers alone")
    return tuple(
        CacheLayer(heads=k.shape[1], key_size=k.shape[3], value_size=v.shape[3]) for k, v in held
    )


def _is_whole(loaded: LoadedModel, held: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether two tokens one after the other, with the cache between, give what both at once do."""
    step, ids = CachedStep(loaded.module), torch.tensor([[1, 2]])
    empty = {
        f"{PAST}.{n}.{part}": t[:, :, :0]
        for n, pair in enumerate(held)
        for part, t in zip(("key", "value"), pair, strict=True)
    }
    with torch.no_grad(), quiet():
        both = step(**feeds(loaded.module, ids, torch.ones_like(ids), empty))
        first = step(**feeds(loaded.module, ids[:, :1], torch.ones_like(ids[:, :1]), empty))
        cache = as_past({n: tensor for n, tensor in first.items() if n.startswith(PRESENT)})
        second = step(**feeds(loaded.module, ids[:, 1:], torch.ones_like(ids), cache))
    expected = both["logits"][:, -1]
    error = (second["logits"][:, -1] - expected).norm() / (expected.norm() or 1.0)
    return bool(error < 1e-3)  # rounding is far below; a forgotten state is far above


def as_past(outputs: Mapping[str, T]) -> dict[str, T]:
    """Name what one step puts out as the next one takes it; other names stay.

    Example:
        >>> as_past({"present.0.key": 1})
        {'past_key_values.0.key': 1}
    """
    return {name.replace(PRESENT, PAST, 1): value for name, value in outputs.items()}


def feeds(module: nn.Module, ids: Tensor, mask: Tensor, cache: Batch) -> Batch:
    """Name the inputs of one step.

    Args:
        module: the model.
        ids: int64 `(batch, sequence)`, the new tokens.
        mask: int64 `(batch, past_sequence + sequence)`, 0 at padding.
        cache: `past_key_values.N.key` and `.value`.
    """
    batch = {"input_ids": ids, "attention_mask": mask}
    if takes_positions(module):
        positions = mask.cumsum(1) - 1
        batch[POSITIONS] = positions.clamp(min=0)[:, -ids.shape[1] :]
    return {**batch, **cache}


def empty_cache(layers: tuple[CacheLayer, ...], rows: int, past: int = 0) -> Batch:
    """Make a cache of zeros, float32.

    Args:
        layers: of the model.
        rows: of the batch.
        past: how many positions it holds.
    """
    cache = {}
    for n, layer in enumerate(layers):
        cache[f"{PAST}.{n}.key"] = torch.zeros(rows, layer.heads, past, layer.key_size)
        cache[f"{PAST}.{n}.value"] = torch.zeros(rows, layer.heads, past, layer.value_size)
    return cache


def _no_decoder(loaded: LoadedModel, why: str) -> ExportError:
    return ExportError(
        f"{type(loaded.module).__name__} of {loaded.source} cannot be exported with a cache: it "
        f"{why}",
        fix="export it without --kv-cache",
    )
