"""Run an encoder-decoder as two functions of plain tensors: its encoder, and steps of its decoder.

=====================================  ====================================================
 encoder: what the model reads          `input_ids` and `attention_mask`, `input_features`, ...
 `encoder_hidden_states`                `(batch, encoder_sequence, width)`, its output
 `present.N.encoder.key`, `.value`      `(batch, heads, encoder_sequence, head size)`: what layer N
                                        of the decoder sees of it; only with a cache
 decoder: `decoder_input_ids`           int64 `(batch, decoder_sequence)`, the new tokens
 `encoder_attention_mask`               int64 `(batch, encoder_sequence)`, where texts are read
 `encoder_hidden_states`                without a cache
 `past_key_values.N.encoder.key`, ...   with one: the encoder's `present.N.encoder.key`, ...
 `past_key_values.N.decoder.key`, ...   with one: `(batch, heads, past_sequence, head size)`
 `logits`                               `(batch, decoder_sequence, vocabulary)`
 `present.N.decoder.key`, `.value`      the cache with the new tokens, for the next step
=====================================  ====================================================

The names are those of Hugging Face's optimum, but for `decoder_input_ids`. The encoder computes the
keys and values of cross-attention once, so that one graph serves the decoder's prompts and steps.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilodelta.errors import ExportError, one_line
from kilodelta.models.generation.cache import PAST, PRESENT, CacheLayer
from kilodelta.models.inputs.examples import example_image, vocabulary
from kilodelta.models.loaded import Batch, LoadedModel
from kilodelta.models.quiet import quiet

ENCODED = "encoder_hidden_states"
ENCODER_MASK = "encoder_attention_mask"
DECODER = "decoder_input_ids"
CROSS, OWN = "encoder", "decoder"
"""The two kinds of attention in the names of a cache's tensors."""


@dataclass(frozen=True, kw_only=True)
class Seq2Seq:
    """The sizes of an encoder-decoder's two halves.

    Attributes:
        source: the names of the encoder's inputs.
        width: numbers per position of the encoder's output.
        layers: the decoder's cache of its own tokens, by layer.
        cross: its cache of what the encoder puts out, by layer.
        vocabulary: tokens that the decoder knows.
    """

    source: tuple[str, ...]
    width: int
    layers: tuple[CacheLayer, ...]
    cross: tuple[CacheLayer, ...]
    vocabulary: int

    @property
    def reads_text(self) -> bool:
        """Whether the encoder reads tokens, whose number varies, beside a mask."""
        return self.source[0] == "input_ids"


class EncoderHalf(nn.Module):
    """The encoder as a function from a batch to `encoder_hidden_states`.

    Args:
        module: an encoder-decoder of transformers.
        cached: put out the keys and values of the decoder's cross-attention as well.
    """

    def __init__(self, module: nn.Module, *, cached: bool) -> None:
        super().__init__()
        self.module, self.cached = module, cached

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Compute the tensors that the module's docstring names."""
        hidden = self.module.get_encoder()(**batch).last_hidden_state  # type: ignore[operator]
        named = {ENCODED: hidden}
        if self.cached:
            # Keys and values hang on the encoder's output alone, so any token will do.
            token = hidden.new_zeros(hidden.shape[0], 1, dtype=torch.long)
            cache = _run(self.module, hidden, token, cache=_cache([], [])).past_key_values
            for n, layer in enumerate(cache.cross_attention_cache.layers):
                named[f"{PRESENT}.{n}.{CROSS}.key"] = layer.keys
                named[f"{PRESENT}.{n}.{CROSS}.value"] = layer.values
        return named


class DecoderHalf(nn.Module):
    """The decoder as a function from new tokens, and the encoder's output or a cache, to logits.

    Args:
        module: an encoder-decoder of transformers.
        width: of the encoder's output.
    """

    def __init__(self, module: nn.Module, *, width: int) -> None:
        super().__init__()
        self.module, self.width = module, width

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Compute the tensors that the module's docstring names."""
        ids, mask = batch[DECODER], batch.get(ENCODER_MASK)
        if ENCODED in batch:
            return {"logits": _run(self.module, batch[ENCODED], ids, mask).logits}
        own, cross = (_pairs(batch, kind) for kind in (OWN, CROSS))
        keys = cross[0][0]
        # Only its shape is looked at: what it says is in the cache.
        hidden = keys.new_zeros(keys.shape[0], keys.shape[2], self.width)
        result = _run(self.module, hidden, ids, mask, _cache(own, cross))
        named = {"logits": result.logits}
        layers = result.past_key_values.self_attention_cache.layers
        for n, layer in enumerate(layers[: len(own)]):
            named[f"{PRESENT}.{n}.{OWN}.key"] = layer.keys
            named[f"{PRESENT}.{n}.{OWN}.value"] = layer.values
        return named


def is_seq2seq(loaded: LoadedModel) -> bool:
    """Return whether a model is an encoder-decoder that writes texts, such as T5 or Whisper."""
    module = loaded.module
    if not getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        return False
    taken = inspect.signature(module.forward).parameters
    writes = getattr(module, "can_generate", lambda: False)()
    return bool(writes) and {DECODER, "encoder_outputs", "past_key_values"} <= taken.keys()


def source_example(loaded: LoadedModel, *, rows: int, tokens: int) -> Batch:
    """Make up what an encoder reads, always the same.

    Args:
        loaded: an encoder-decoder.
        rows: rows of the batch.
        tokens: tokens of each row, where it reads texts.

    Raises:
        ExportError: the model does not say what its inputs look like.
    """
    module, chance = loaded.module, torch.Generator().manual_seed(0)
    config: Any = module.config
    name = str(module.main_input_name)
    if name == "input_ids":
        ids = torch.randint(vocabulary(module), (rows, tokens), generator=chance)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shape: tuple[int, ...] | None = None
    if name == "pixel_values":
        shape = example_image(getattr(config, "encoder", config))
    elif name == "input_features" and hasattr(config, "num_mel_bins"):
        # Whisper's convolutions halve the frames; it takes exactly as many as it has positions.
        shape = config.num_mel_bins, 2 * config.max_source_positions
    if shape is None:
        raise _no_halves(loaded, f"does not say what its {name} look like")
    return {name: torch.randn(rows, *shape, generator=chance)}


def measure(loaded: LoadedModel, source: Batch) -> Seq2Seq:
    """Measure the two halves of an encoder-decoder by running it on two tokens.

    Args:
        loaded: the model.
        source: what its encoder reads.

    Raises:
        ExportError: it does not run, or keeps something else between steps than keys and values.
    """
    rows = {name: tensor[:1] for name, tensor in source.items()}
    tokens = torch.zeros(1, 2, dtype=torch.long)
    try:
        with torch.no_grad(), quiet():
            hidden = loaded.module.get_encoder()(**rows).last_hidden_state  # type: ignore[operator]
            result = _run(loaded.module, hidden, tokens, cache=_cache([], []))
        own = _sizes(result.past_key_values.self_attention_cache)
        cross = _sizes(result.past_key_values.cross_attention_cache)
    except Exception as error:  # a module's own code may raise anything
        raise _no_halves(loaded, f"does not run in halves ({one_line(error)})") from error
    if not own or len(own) != len(cross) or result.logits.ndim != 3:
        raise _no_halves(loaded, "keeps something else than keys and values between steps")
    return Seq2Seq(
        source=tuple(source),
        width=hidden.shape[-1],
        layers=own,
        cross=cross,
        vocabulary=result.logits.shape[-1],
    )


def empty_own(halves: Seq2Seq, rows: int, past: int = 0) -> Batch:
    """Make a cache of the decoder's own tokens: zeros, float32, `past` positions."""
    return _zeros(halves.layers, OWN, rows, past)


def empty_cross(halves: Seq2Seq, rows: int, length: int) -> Batch:
    """Make a cache of an encoder's output of `length` positions: zeros, float32."""
    return _zeros(halves.cross, CROSS, rows, length)


def _zeros(layers: tuple[CacheLayer, ...], kind: str, rows: int, length: int) -> Batch:
    cache = {}
    for n, layer in enumerate(layers):
        cache[f"{PAST}.{n}.{kind}.key"] = torch.zeros(rows, layer.heads, length, layer.key_size)
        cache[f"{PAST}.{n}.{kind}.value"] = torch.zeros(rows, layer.heads, length, layer.value_size)
    return cache


def _run(
    module: nn.Module, hidden: Tensor, ids: Tensor, mask: Tensor | None = None, cache: Any = None
) -> Any:
    """Run the decoder through the whole model, which knows what stands between its halves."""
    from transformers.modeling_outputs import BaseModelOutput

    masks = {} if mask is None else {"attention_mask": mask}
    return module(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        decoder_input_ids=ids,
        past_key_values=cache,
        use_cache=cache is not None,
        **masks,
    )


def _cache(own: list[tuple[Tensor, Tensor]], cross: list[tuple[Tensor, Tensor]]) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(own or None), DynamicCache(cross or None))
    cache.is_updated = dict.fromkeys(range(len(cross)), True)
    return cache


def _pairs(batch: Batch, kind: str) -> list[tuple[Tensor, Tensor]]:
    count = sum(name.endswith(f".{kind}.key") for name in batch)
    names = [f"{PAST}.{n}.{kind}" for n in range(count)]
    return [(batch[f"{name}.key"], batch[f"{name}.value"]) for name in names]


def _sizes(cache: Any) -> tuple[CacheLayer, ...]:
    return tuple(
        CacheLayer(heads=x.keys.shape[1], key_size=x.keys.shape[3], value_size=x.values.shape[3])
        for x in cache.layers
    )


def _no_halves(loaded: LoadedModel, why: str) -> ExportError:
    return ExportError(
        f"{type(loaded.module).__name__} of {loaded.source} cannot be exported as an encoder and a "
        f"decoder: it {why}",
        fix="give --inputs with all that it takes, decoder_input_ids as well, and leave --kv-cache "
        "out: the whole model is then one graph",
    )
