"""Tied embeddings: what PEFT's live adapter computes, or a refusal that names both layers.

The oracle is the live model: PEFT's own merge of a tied table adds the update once for each of the
layers that share it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    T5Config,
    T5ForConditionalGeneration,
)

import kilodelta
from kilodelta.compress.adapters import import_adapter
from kilodelta.errors import InputError
from tests.support import adapters, pico

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(4, 16)[None]


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **options})


def live(base: Path, config: Any, folder: Path) -> torch.Tensor:
    """Save a random adapter; returns the live model's logits."""
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = adapters.adapted(model, config).eval()
    with torch.no_grad():
        logits: torch.Tensor = wrapped(IDS).logits
    adapters.save(wrapped, folder)
    return logits


def merged_logits(base: Path, file: Path, out: Path) -> torch.Tensor:
    kilodelta.merge(base, file, out)
    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(out).eval()(IDS).logits
    return logits


def base_logits(base: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(base).eval()(IDS).logits
    return logits


TYING: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    # PEFT ties only what is called embed_tokens or lm_head; wte alone would part from its head
    "gpt2": ("gpt2", {"target_modules": ["lm_head", "c_attn"]}),
    "saved": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "both-saved": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
}


@pytest.mark.parametrize("case", TYING)
def test_ensured_ties_change_the_shared_table_once(case: str, tmp_path: Path) -> None:
    kind, options = TYING[case]
    base = pico.MODELS[kind](tmp_path / "base")
    config = lora(ensure_weight_tying=True, **options)
    theirs = live(base, config, tmp_path / "adapter")
    import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd", bits=16)
    ours = merged_logits(base, tmp_path / "task.kd", tmp_path / "out")
    moved = (theirs - base_logits(base)).norm()
    assert (ours - theirs).norm() < 2e-3 * moved
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


PARTING: dict[str, tuple[str, list[str]]] = {
    "embedding": ("llama", ["q_proj", "embed_tokens"]),
    "head": ("llama", ["q_proj", "lm_head"]),
    "both": ("llama", ["embed_tokens", "lm_head"]),
    "gpt2": ("gpt2", ["wte"]),
}


@pytest.mark.parametrize("case", PARTING)
def test_a_lora_on_one_of_two_tied_layers_is_refused_by_both_names(
    case: str, tmp_path: Path
) -> None:
    kind, targets = PARTING[case]
    base = pico.MODELS[kind](tmp_path / "base")
    theirs = live(base, lora(target_modules=targets), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"and lm_head\.weight are one tensor in .*tied") as error:
        import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd")
    assert "untie the base once" in error.value.fix
    assert not (tmp_path / "task.kd").exists()
    # the way out that the error names (docs/import.md has these lines)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.save_pretrained(tmp_path / "untied")
    import_adapter(tmp_path / "adapter", tmp_path / "untied", tmp_path / "task.kd", bits=16)
    ours = merged_logits(tmp_path / "untied", tmp_path / "task.kd", tmp_path / "out")
    assert (ours - theirs).norm() < 2e-3 * (theirs - base_logits(base)).norm()


@pytest.mark.parametrize("saved", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
def test_saved_tables_part_as_they_do_in_peft(saved: list[str], tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    config = lora(target_modules=["q_proj"], modules_to_save=saved)
    theirs = live(base, config, tmp_path / "adapter")
    done = import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd", bits=16)
    assert "lm_head.weight" in done.extras
    ours = merged_logits(base, tmp_path / "task.kd", tmp_path / "out")
    assert (ours - theirs).norm() < 2e-3 * (theirs - base_logits(base)).norm()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_a_saved_head_parts_from_an_adapted_embedding(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    config = lora(target_modules=["embed_tokens"], modules_to_save=["lm_head"])
    theirs = live(base, config, tmp_path / "adapter")
    import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd", bits=16)
    ours = merged_logits(base, tmp_path / "task.kd", tmp_path / "out")
    assert (ours - theirs).norm() < 2e-3 * (theirs - base_logits(base)).norm()


def repeated(base: Path) -> Path:
    """The base with its tied head written out, as some tools save it."""
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize("tying", [True, False])
def test_a_file_that_repeats_the_tied_head_keeps_both_right(tying: bool, tmp_path: Path) -> None:
    base = repeated(pico.llama(tmp_path / "base"))
    config = lora(target_modules=["v_proj", "embed_tokens"], ensure_weight_tying=tying)
    theirs = live(base, config, tmp_path / "adapter")
    import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd", bits=16)
    ours = merged_logits(base, tmp_path / "task.kd", tmp_path / "out")
    assert (ours - theirs).norm() < 2e-3 * (theirs - base_logits(base)).norm()
    after = load_file(tmp_path / "out" / "model.safetensors")
    same = torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert same is tying


def test_a_head_that_differs_in_the_file_is_not_tied(tmp_path: Path) -> None:
    """transformers loads two tensors of the files untied where they differ."""
    base = repeated(pico.llama(tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] += 0.1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    theirs = live(base, lora(target_modules=["lm_head"]), tmp_path / "adapter")
    import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd", bits=16)
    ours = merged_logits(base, tmp_path / "task.kd", tmp_path / "out")
    assert (ours - theirs).norm() < 2e-3 * (theirs - base_logits(base)).norm()


def test_a_longer_vocabulary_travels_with_its_number(tmp_path: Path) -> None:
    """PEFT saves embeddings that were resized; both layers share the new table."""
    base = pico.llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    with adapters.quiet():
        model.resize_token_embeddings(pico.VOCABULARY + 3)
    wrapped = adapters.adapted(model, lora(target_modules=["q_proj"])).eval()
    with torch.no_grad():
        theirs = wrapped(IDS).logits
        wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd", bits=16)
    ours = merged_logits(base, tmp_path / "task.kd", tmp_path / "out")
    assert ours.shape[-1] == pico.VOCABULARY + 3
    assert (ours - theirs).norm() < 2e-3 * theirs.norm()


def test_four_tied_tables_are_refused_by_their_names(tmp_path: Path) -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    wrapped = adapters.adapted(model, lora(target_modules=["q", "shared"]))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    with pytest.raises(InputError, match=r"shared\.weight and .*decoder\.embed_tokens\.weight"):
        import_adapter(folder, tmp_path / "base", tmp_path / "task.kd")


def test_other_methods_do_not_change_a_tied_head_alone(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    live(base, peft.VeraConfig(r=4, target_modules=["lm_head"]), tmp_path / "adapter")
    with pytest.raises(InputError, match="are one tensor in"):
        import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd")
