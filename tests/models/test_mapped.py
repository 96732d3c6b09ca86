"""Weights that are the files' own memory, and the small twin that finds their places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kilodelta.errors import CheckpointError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.models import open_model
from kilodelta.models.twin import bits, content, content_of, unique, unique_views
from kilodelta.models.weights import MappedCheckpoint, place, tensor
from tests.support import pico


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pico.llama(tmp_path / "model")


def test_mapped_weights_are_the_files_and_stay_tied(folder: Path) -> None:
    loaded = open_model(folder, mapped=True)
    stored = load_file(folder / "model.safetensors")
    state = loaded.module.state_dict()
    assert loaded.names.keys() == stored.keys()
    for name, place_name in loaded.names.items():
        assert torch.equal(state[place_name], stored[name]), name
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_what_is_written_into_mapped_weights_stays_in_the_process(folder: Path) -> None:
    file = folder / "model.safetensors"
    before = file.read_bytes()
    loaded = open_model(folder, mapped=True)
    with torch.no_grad():
        for weight in loaded.module.parameters():
            weight.fill_(7)
    assert file.read_bytes() == before
    assert all(bool((weight == 7).all()) for weight in loaded.module.parameters())


def test_another_type_or_a_file_at_odd_places_is_copied(folder: Path) -> None:
    half = open_model(folder, dtype=torch.bfloat16, mapped=True)
    assert {p.dtype for p in half.module.parameters()} == {torch.bfloat16}
    file = folder / "model.safetensors"
    text = file.read_bytes()
    size = int.from_bytes(text[:8], "little")
    file.write_bytes(
        (size + 1).to_bytes(8, "little") + text[8 : 8 + size] + b" " + text[8 + size :]
    )
    odd = Checkpoint.open(folder)
    assert MappedCheckpoint(odd).tensor(odd.names[0]) is None
    state = open_model(folder, mapped=True).module.state_dict()
    assert torch.equal(state["model.norm.weight"], tensor(odd, "model.norm.weight"))


def test_memory_that_was_given_back_is_read_again(tmp_path: Path) -> None:
    values = torch.arange(1 << 14, dtype=torch.float32)
    save_file({"a": values, "b": values + 1}, tmp_path / "m.safetensors")
    mapped = MappedCheckpoint(Checkpoint.open(tmp_path / "m.safetensors"))
    a, b = mapped.tensor("a"), mapped.tensor("b")
    assert a is not None
    assert b is not None
    b[:] = 0
    mapped.release(["a"])
    assert torch.equal(a, values)
    assert not b.any()  # its pages were not given back, what was written is still there


def test_a_tensor_of_another_shape_is_named(folder: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor weight has shape \(2, 3\), .* \(3, 2\)"):
        place(nn.Linear(2, 3), Checkpoint.open(tmp_path / "m.safetensors"), {"weight": "weight"})


def _own_memory() -> int:
    """Return the bytes of memory that belong to this process alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts it")
def test_opening_a_mapped_model_takes_no_memory_for_its_weights(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(vocab_size=30_000, **sizes, **heads)).save_pretrained(tmp_path)
    open_model(tmp_path, mapped=True)  # what a first time allocates is not the weights
    before, size = _own_memory(), (tmp_path / "model.safetensors").stat().st_size
    loaded = open_model(tmp_path, mapped=True)
    touched = [weight.detach().sum() for weight in loaded.module.parameters()]
    assert touched
    assert size > 30e6
    assert _own_memory() - before < 0.25 * size


SPECS = {
    "bias": ((5,), torch.float32),
    "conv": ((4, 3, 2, 2), torch.float32),
    "empty": ((0, 3), torch.float32),
    "half": ((6, 6), torch.bfloat16),
    "number": ((), torch.int64),
    "square": ((6, 6), torch.float32),
    "tall": ((9, 2), torch.float32),
    "wide": ((2, 9), torch.float32),
}


def test_views_are_as_unlike_as_whole_twins() -> None:
    views = unique_views(SPECS)
    assert {name: (tuple(v.shape), v.dtype) for name, v in views.items()} == SPECS
    prints = [content_of(v) for v in views.values()]
    prints += [content_of(v.t()) for v in views.values() if v.dim() == 2 and v.numel()]
    assert len(set(prints)) == len(prints)
    square = views["square"]
    orders = list(_permutations(6))
    assert len({content_of(square[order]) for order in orders}) == len(orders)


def _permutations(count: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    yield torch.arange(count)
    yield torch.arange(count).flip(0)
    yield torch.arange(count).roll(1)
    yield torch.arange(count).view(2, -1).t().reshape(-1)  # as rotary heads are interleaved
    yield from (torch.randperm(count, generator=generator) for _ in range(5))


def test_a_view_and_a_copy_of_it_have_one_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilodelta.models.twin.BLOCK", 4)  # several parts each
    for values in (*unique(SPECS).values(), *unique_views(SPECS).values()):
        assert content_of(values) == content(bits(values))
