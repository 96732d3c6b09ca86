"""Which matrices of a merged model count as its output head."""

from __future__ import annotations

from pathlib import Path

import kilodelta
from kilodelta.compress import Options, compress
from kilodelta.format.methods import Lora
from tests.support import pico


def test_a_matrix_of_a_layer_is_no_head_although_it_has_the_embedding_s_shape(
    tmp_path: Path,
) -> None:
    """Its intermediate width is the number of words: transformers must go on tying the two."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=pico.VOCABULARY,
        hidden_size=pico.WIDTH,
        intermediate_size=pico.VOCABULARY,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    base = pico.save(lambda: LlamaForCausalLM(config), tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned")
    compress(base, tuned, tmp_path / "a.kd", options=Options(method=Lora(rank=2)))
    kilodelta.merge(base, tmp_path / "a.kd", tmp_path / "merged")
    texts = [(folder / "config.json").read_bytes() for folder in (base, tmp_path / "merged")]
    assert texts[0] == texts[1]
