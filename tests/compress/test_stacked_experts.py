"""Experts that one parameter stacks: each matrix is a target with its own trained update."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kilodelta
from kilodelta.compress import Options, compress
from kilodelta.compress.training import train
from kilodelta.export.merge.in_place import merge_into
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.file import load
from kilodelta.format.methods import Lora, Method, Nola, RandLora
from kilodelta.models import open_model
from kilodelta.models.layers import layer_weights, stacked_weights
from tests.support import pico


class Experts(nn.Module):
    """A mixture of three experts, which weighs them by a token's first numbers."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shape = (3, 6, 5) if is_transposed else (3, 5, 6)
        self.up = nn.Parameter(torch.randn(shape) / 3)
        self.up_bias = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        up = self.up if self.is_transposed else self.up.transpose(1, 2)
        each = torch.einsum("ni,eio->eno", x, up) + self.up_bias[:, None]
        return torch.einsum("eno,ne->no", each, x[:, :3])


@pytest.mark.parametrize("method", [Lora(rank=2), Nola(rank=2, bases=20), RandLora(rank=2)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_an_attached_stack_computes_what_is_merged(method: Method, is_transposed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Experts(is_transposed))
    before = copy.deepcopy(model)
    train.attach(model, method, "*.up", seed=5)
    attachment = train.attached(model)
    shapes = [place.target.matrix for place in attachment.places]
    assert shapes == [(5, 6)] * 3
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.02)
    x, wanted = torch.randn(40, 6), torch.randn(40, 5)
    for _ in range(3):
        optimiser.zero_grad()
        ((model(x) - wanted) ** 2).mean().backward()
        optimiser.step()
    sizes = [attachment.update(index).matrix().norm() for index in range(3)]
    assert min(sizes) > 0
    assert len({f"{size:.5f}" for size in sizes}) == 3  # each has its own
    train.quantise(model, 8)
    computed = model(x)
    delta = train.to_delta(model)
    assert delta.manifest.patterns.stacked
    merge_into(before, delta)
    assert torch.allclose(before(x), computed, atol=1e-5)
    # and by hand: the base's matrix plus each expert's own update
    train.detach(model)
    old, new = (m.state_dict()["0.up"].numpy() for m in (model, before))
    for expert in range(3):
        update = delta.update(f"0.up[{expert}]")
        by_hand = old[expert] + (update.T if is_transposed else update)
        assert np.array_equal(new[expert], by_hand)


def test_what_is_a_stack_of_experts() -> None:
    model = nn.Sequential(Experts(True), nn.Conv1d(6, 5, 3), nn.Linear(6, 5))
    names = {name: name for name in model.state_dict()}
    assert stacked_weights(model, names) == {"0.up"}
    assert layer_weights(model, names) == {"0.up", "1.weight", "2.weight"}


def test_dbrx_experts_are_trained_where_the_module_around_reads_them() -> None:
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts

    config = transformers.DbrxConfig().ffn_config
    config.hidden_size, config.ffn_hidden_size, config.moe_num_experts = 6, 4, 3
    experts = DbrxExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    names = {name: name for name in experts.state_dict()}
    assert layer_weights(experts, names) == {"mlp.v1", "mlp.w1", "mlp.w2"}
    given = torch.randn(1, 7, 6), torch.randint(0, 3, (7, 2)), torch.rand(7, 2)
    before = experts(*given)
    train.attach(experts, Lora(rank=2), "mlp.*")
    with torch.no_grad():
        for groups in train.attached(experts).own:
            for parameter in groups.parameters():
                parameter.copy_(torch.randn_like(parameter))
    assert (experts(*given) - before).norm() > 0.01 * before.norm()


SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module", params=["gpt_oss", "granitemoe"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a copy of which only the experts changed: each matrix by a rank of 1."""
    folder = tmp_path_factory.mktemp(request.param)
    config = transformers.AutoConfig.for_model(request.param, **SIZES)
    pico.save(lambda: transformers.AutoModelForCausalLM.from_config(config), folder / "base")
    pico.tuned(folder / "base", folder / "tuned", size=0)
    place = folder / "tuned" / "model.safetensors"
    tensors = load_file(place)
    for name, value in tensors.items():
        if value.ndim == 3:
            left = torch.randn(*value.shape[:2], 1)
            tensors[name] = value + 0.1 * left @ torch.randn(len(value), 1, value.shape[2])
    save_file(tensors, place, {"format": "pt"})
    return folder


def test_experts_are_targets_and_a_rank_of_each_keeps_the_whole_change(pair: Path) -> None:
    options = Options(method=Lora(rank=1), bits=16)
    report = compress(pair / "base", pair / "tuned", pair / "a.kd", options=options)
    assert report.targets == 6  # two stacks of three
    assert report.dropped == ()
    assert report.weight_error < 1e-3  # a single update of that rank for a stack cannot do it
    delta = load(pair / "a.kd", base=pair / "base")
    assert all(len(parts) == 3 for parts in delta.tensors.values())
    kilodelta.merge(pair / "base", pair / "a.kd", pair / "merged")
    merged, tuned = Checkpoint.open(pair / "merged"), Checkpoint.open(pair / "tuned")
    for name in delta.tensors:
        ours, theirs = (m.data(name).view("<f4") for m in (merged, tuned))
        assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_what_is_excluded_is_in_the_error(pair: Path) -> None:
    stacks = sorted(stacked_weights(*opened(pair / "base")))
    options = Options(method=Lora(rank=1), bits=16, exclude=(stacks[0],))
    report = compress(pair / "base", pair / "tuned", pair / "half.kd", options=options)
    assert report.targets == 3
    base, tuned = (Checkpoint.open(pair / name) for name in ("base", "tuned"))
    energies = [float(((tuned.data(n).view("<f4") - base.data(n).view("<f4")) ** 2).sum())
                for n in stacks]  # fmt: skip
    assert report.weight_error == pytest.approx((energies[0] / sum(energies)) ** 0.5, rel=1e-3)


def test_a_model_whose_module_cannot_be_built_has_the_same_stacks(pair: Path) -> None:
    base, tuned = (pair / f"{name}.safetensors" for name in ("base", "tuned"))
    for place, folder in ((base, "base"), (tuned, "tuned")):
        place.write_bytes((pair / folder / "model.safetensors").read_bytes())
    report = compress(base, tuned, pair / "b.kd", options=Options(method=Lora(rank=1), bits=16))
    assert report.targets == 6
    assert report.weight_error < 1e-3


def test_experts_learn_from_inputs(pair: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 48, (12, 9))
    np.savez(pair / "in.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    options = Options(method=Nola(rank=2, bases=64), steps=3, batch=4)
    report = compress(
        pair / "base", pair / "tuned", pair / "c.kd", inputs=str(pair / "in.npz"), options=options
    )
    assert report.targets == 6
    assert any(layer.relative_norm > 0 for layer in report.layers)


def opened(folder: Path) -> tuple[nn.Module, Any]:
    loaded = open_model(folder)
    return loaded.module, loaded.names
