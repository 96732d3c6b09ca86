"""Experts that files hold one by one and transformers stacks: each matrix keeps its name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import numpy as np
import torch
import transformers

import kilodelta
from kilodelta.compress import Options, compress
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.file import load
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid import open_quantised
from kilodelta.grid.quantise import quantise_folder
from kilodelta.merging.build import Recipe, build, quantise_target
from kilodelta.models import experts, open_model, outputs
from kilodelta.models.stacked import Stacked, unstack
from kilodelta.verify import verify
from tests.support import pico

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}
BATCH = {"input_ids": torch.tensor([[5, 9, 30, 7], [8, 4, 11, 40]])}


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.AutoConfig.for_model(request.param, **SIZES)
    make = transformers.AutoModelForCausalLM.from_config
    return pico.save(lambda: make(config), tmp_path_factory.mktemp("moe") / request.param)


def test_codes_of_experts_are_verified_against_their_exact_values(
    folder: Path, tmp_path: Path
) -> None:
    """The reference computes in float64, which transformers' own product of experts does not."""
    quantise_folder(folder, tmp_path / "q", "fp8", lambda name: ".experts." in name)
    lora, base = Lora(rank=1), open_quantised(tmp_path / "q")
    values = {
        name: quantise_target(
            lora, {"A": np.ones((1, one.shape[1])), "B": np.ones((one.shape[0], 1))}, 8
        )
        for name, one in base.stored.items()
    }
    patterns = Patterns(include=tuple(values), exclude=())
    build(tmp_path / "q", Recipe(method=lora, patterns=patterns), values).save(tmp_path / "a.kd")
    np.savez(tmp_path / "x.npz", input_ids=BATCH["input_ids"].numpy())
    done = verify(tmp_path / "q", tmp_path / "a.kd", inputs=tmp_path / "x.npz")
    assert done.failure is None


def theirs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        logits: torch.Tensor = model(**BATCH, use_cache=False).logits
    return logits


def test_every_matrix_of_the_files_has_a_place_and_the_outputs_are_theirs(folder: Path) -> None:
    loaded = open_model(folder)
    assert set(loaded.names) == set(Checkpoint.open(folder).names)
    assert (loaded.missing, loaded.unused) == ((), ())
    one_by_one = [name for name in loaded.names if ".experts." in name]
    assert len(one_by_one) == 9  # gate, up and down of three experts
    state = loaded.module.state_dict()
    checkpoint = Checkpoint.open(folder)
    for name in one_by_one:  # in memory as in the file: no transpose, no other expert's rows
        raw = checkpoint.raw(name)
        assert state[loaded.names[name]].numpy().tobytes() == raw.data.tobytes()
    with torch.no_grad():
        ours = outputs(loaded, BATCH)["logits"]
        wide = copy.deepcopy(loaded.module).double()
        experts.use(wide, experts.EXACT)
        doubled = wide(**BATCH, use_cache=False).logits
    torch.testing.assert_close(ours, theirs(folder), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(doubled.float(), theirs(folder), rtol=1e-5, atol=1e-5)


def test_experts_are_trained_by_default_and_merged_into_the_files(
    folder: Path, tmp_path: Path
) -> None:
    tuned = pico.tuned(folder, tmp_path / "tuned", size=0.1)
    file, batch = tmp_path / "a.kd", tmp_path / "in.npz"
    np.savez(batch, input_ids=np.tile(BATCH["input_ids"].numpy(), (4, 1)))
    options = Options(method=Lora(rank=2), steps=2, batch=2)
    compress(folder, tuned, file, inputs=str(batch), options=options)
    changed = load(file, folder).targets
    assert sum(".experts." in name for name in changed) == 9
    kilodelta.merge(folder, file, tmp_path / "merged")
    opened = open_model(tmp_path / "merged")
    with torch.no_grad():
        ours = outputs(opened, BATCH)["logits"]
    torch.testing.assert_close(ours, theirs(tmp_path / "merged"), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, theirs(folder), atol=1e-3)


def test_a_stack_is_cut_into_the_matrices_that_it_was_made_of() -> None:
    parts = tuple(torch.arange(i * 100.0, i * 100 + n * 4).view(n, 4) for i, n in enumerate((2, 3)))
    again = tuple(part + 1000 for part in parts)
    stack = Stacked([2, 3], experts=2)
    whole = stack(*parts, *again)
    assert whole.shape == (2, 5, 4)
    torch.testing.assert_close(whole[1, 2:], again[1], rtol=0, atol=0)
    for part, cut in zip((*parts, *again), stack.right_inverse(whole), strict=True):
        torch.testing.assert_close(cut, part, rtol=0, atol=0)
    assert Stacked([2, 3], experts=0)(*parts).shape == (5, 4)


def test_what_is_no_stack_of_whole_matrices_is_left_alone() -> None:
    """Rows that alternate (gate 0, up 0, gate 1, ...), and one row too many."""
    gate, up = torch.rand(3, 4), torch.rand(3, 4)
    for values in (torch.stack([gate, up], 1).view(6, 4), torch.cat([gate, up, up[:1]])):
        module = torch.nn.Module()
        module.register_parameter("both", torch.nn.Parameter(values))
        assert unstack(module, ["both"], {"gate": gate, "up": up}, {}) == {}
        assert list(module.state_dict()) == ["both"]
