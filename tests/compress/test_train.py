"""Training: the attached model computes what the merged file computes, for every method."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kilodelta
from kilodelta.compress.training import layers, train
from kilodelta.compress.training.update import FactoredUpdate
from kilodelta.errors import BaseMismatchError, InputError
from kilodelta.format.methods import Method
from tests.support.making import METHODS, ids


class Net(nn.Module):
    """An embedding, a convolution and linear layers, out != in."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 10)
        self.conv = nn.Conv1d(10, 8, 3, padding=1)
        self.tall = nn.Linear(8, 15)
        self.wide = nn.Linear(15, 9)
        self.norm = nn.LayerNorm(9)
        self.head = nn.Linear(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        found: Tensor = self.head(self.norm(self.wide(torch.tanh(self.tall(x)))))
        return found


TARGETS = ("embed.weight", "tall.weight", "wide.weight")
IDS = torch.arange(24).reshape(2, 12) % 12


def make() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def train_a_little(model: nn.Module, steps: int = 5) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=3e-2)
    wanted = torch.sin(torch.arange(96.0)).reshape(2, 12, 4)
    for _ in range(steps):
        loss = (model(IDS) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_the_attached_model_is_the_merged_one(method: Method, bits: int, tmp_path: Path) -> None:
    model = make()
    before = model(IDS).detach()
    base = tmp_path / "base.safetensors"
    save_file(model.state_dict(), base)
    train.attach(model, method, TARGETS, seed=7)
    train_a_little(model)
    train.quantise(model, bits)
    train_a_little(model, 3)
    attached = model(IDS).detach()
    train.save(model, tmp_path / "task.kd", base=base)
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "merged.safetensors")
    merged = make()
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    found = merged(IDS).detach()
    # float32 sums of at most 30 terms in another order, through four layers: some 100 ulp
    assert torch.allclose(attached, found, rtol=0, atol=100 * 2.0**-24 * float(found.abs().max()))
    assert float((found - before).abs().max()) > 1e-3, "nothing was learned: this proves nothing"
    train.detach(model)
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_only_coefficients_learn_and_are_saved(method: Method) -> None:
    model = train.attach(make(), method, TARGETS)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert learning
    assert all(name.startswith("kilodelta.") for name in learning)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert not any(name.startswith(("embed", "tall", "wide")) for name in state)
    train_a_little(model)
    after = model(IDS)
    trained = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    assert not torch.allclose(model(IDS), after)
    model.load_state_dict(trained)
    assert torch.equal(model(IDS), after)
    assert torch.equal(copy.deepcopy(model)(IDS), after)


def test_one_glob_or_several() -> None:
    alone = train.attach(make(), train.Lora(rank=1), "t*.weight", exclude="h*", extras="norm.*")
    listed = train.attach(
        make(), train.Lora(rank=1), ["t*.weight"], exclude=["h*"], extras=["norm.*"]
    )
    names = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (alone, listed)]
    assert names[0] == names[1]
    assert [n for n in names[0] if "kilodelta" not in n] == ["norm.weight", "norm.bias"]
    delta = train.to_delta(alone)
    assert pickle.loads(pickle.dumps(delta)).manifest == delta.manifest


def test_extras_train_and_travel_whole(tmp_path: Path) -> None:
    model = make()
    base = tmp_path / "base.safetensors"
    save_file(model.state_dict(), base)
    train.attach(model, train.Lora(rank=2), TARGETS, extras=("head.*",))
    train_a_little(model)
    delta = train.to_delta(model, base)
    assert sorted(delta.extras) == ["head.bias", "head.weight"]
    assert delta.extras["head.bias"].data.tobytes() == model.head.bias.detach().numpy().tobytes()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"targets": "nothing.*"}, "nothing"),
        ({"targets": "*", "seed": -1}, "seed"),
        ({"targets": "norm.weight"}, "norm"),
    ],
)
def test_what_cannot_be_attached_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        train.attach(make(), train.Lora(rank=1), **arguments)


def test_attaching_twice_and_a_wrong_base_are_refused(tmp_path: Path) -> None:
    model = train.attach(make(), train.Lora(rank=1), TARGETS)
    with pytest.raises(InputError):
        train.attach(model, train.Lora(rank=1), TARGETS)
    other = make()
    nn.init.ones_(other.tall.weight)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(BaseMismatchError):
        train.to_delta(model, tmp_path / "other.safetensors")


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_autocast_and_accumulation(method: Method) -> None:
    model = train.attach(make(), method, TARGETS)
    train_a_little(model, 1)
    model.zero_grad()
    seen: list[torch.dtype] = []
    model.tall.register_forward_hook(lambda _module, _args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS).float().square().mean().backward()
    assert seen == [torch.bfloat16]
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert once
    assert all(torch.isfinite(g).all() for g in once.values())
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS).float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in once and parameter.grad is not None:
            assert torch.allclose(parameter.grad, 2 * once[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_a_step_on_the_sum_is_one_with_factors(
    method: Method, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    if transposed:
        layer: Any = pytest.importorskip("transformers.pytorch_utils").Conv1D(20, 12)
    else:
        layer = nn.Linear(12, 20)
    model: nn.Module = nn.Sequential(layer)
    base = layer.weight
    train.attach(model, method, "0.weight")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) / 8)
    given = torch.randn(3, 50, 12, requires_grad=True)
    leaves = [given, *(p for p in model.parameters() if p.requires_grad)]
    results = []
    for answer in (True, False):
        monkeypatch.setattr(layers, "sum_is_cheaper", lambda rows, update, a=answer: a)
        output = model(given)
        gradients = torch.autograd.grad(output.sin().sum(), leaves, allow_unused=True)
        results.append((output, *(g for g in gradients if g is not None)))
        assert layer.weight is base
        with pytest.raises(RuntimeError):
            model(given[..., :5])
        assert layer.weight is base
        assert not [name for name in vars(layer) if "kilodelta" in name]
    assert len(results[0]) > 2
    for found, wanted in zip(*results, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("trained", "rows", "cheaper"),
    [
        ("right", 512, True),
        ("right", 64, False),
        ("both", 512, True),
        ("both", 256, False),
        ("diagonals", 512, False),
    ],
)
def test_the_sum_is_taken_where_it_costs_less(trained: str, rows: int, cheaper: bool) -> None:
    """Counted by hand in millions of multiplications, 768 x 768, inner 768: dW 453 and its
    factor's gradient 453 each, the gradient of dW 0.59 a row; a product with a factor 0.59 a row,
    two forward, two backward, one a trained factor."""
    left, right = (torch.empty(768, 768, requires_grad=trained == "both") for _ in range(2))
    right.requires_grad_(trained != "diagonals")
    one = torch.ones(768, requires_grad=True) if trained == "diagonals" else None
    assert (
        layers.sum_is_cheaper(rows, FactoredUpdate(left=left, right=right, inner=one, rows=one))
        == cheaper
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_every_step_after_quantise_is_the_file_s(method: Method, bits: int) -> None:
    """Each step from `quantise` on computes with rounded numbers, not the last or the saved one
    alone, and learns through the rounding."""
    model = train.attach(make(), method, TARGETS)
    train_a_little(model)
    exact = model(IDS).detach()
    train.quantise(model, bits)
    rounded = [model(IDS).detach()]
    assert not torch.equal(rounded[0], exact)
    for _ in range(3):
        merged = make()
        state, delta = merged.state_dict(), train.to_delta(model)
        assert delta.manifest.bits == bits
        for name in delta.targets:
            state[name] = state[name] + torch.from_numpy(delta.update(name)).view_as(state[name])
        merged.load_state_dict(state)
        found, wanted = model(IDS).detach(), merged(IDS).detach()
        # float32 sums of at most 30 terms in another order, through four layers
        assert torch.allclose(
            found, wanted, rtol=0, atol=100 * 2.0**-24 * float(wanted.abs().max())
        )
        train_a_little(model, 1)
        rounded.append(model(IDS).detach())
    assert not torch.equal(rounded[0], rounded[-1])
    train.quantise(model, None)
    assert not torch.equal(model(IDS).detach(), rounded[-1])


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_quantise_counts_without_gradients_at_once(method: Method) -> None:
    """What the targets share is kept between forward passes without gradients."""
    model = train.attach(make(), method, TARGETS)
    train_a_little(model)
    with torch.no_grad():
        exact = model(IDS)
        assert torch.equal(model(IDS), exact)
        train.quantise(model, 4)
        rounded = model(IDS)
        train.quantise(model, None)
        assert torch.equal(model(IDS), exact)
    assert not torch.equal(rounded, exact)
    train.quantise(model, 4)
    assert torch.allclose(model(IDS), rounded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_rounding_is_kept_in_training_checkpoints(method: Method) -> None:
    model = train.attach(make(), method, TARGETS)
    train_a_little(model)
    train.quantise(model, 4)
    wanted, state = model(IDS).detach(), copy.deepcopy(model.state_dict())
    again = train.attach(make(), method, TARGETS)
    again.load_state_dict(state)
    assert train.attached(again).precision == train.attached(model).precision
    assert torch.equal(again(IDS), wanted)
    numbers = state["kilodelta.rounding"].tolist()
    assert len(numbers) == 5  # as kilodelta 0.1 wrote them
    assert numbers[:2] == [4, train.attached(model).precision.c_max]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (train.Lora(rank=0), "Lora.rank is 0, not a whole number from 1 to 4096"),
        (train.Lora(rank=5000), "Lora.rank is 5000"),
        (train.Nola(rank=2, bases=0), "Nola.bases is 0"),
        (train.Nola(rank=2, bases=1 << 25), "Nola.bases is 33554432"),
        (train.RandLora(rank=2, basis="ternary"), "RandLora.sparsity is 0"),
        (train.RandLora(rank=2, basis="gauss"), "RandLora.basis is 'gauss'"),  # type: ignore[arg-type]
        (train.UniLora(rank=2, anchor=40000), "UniLora.anchor is 40000"),
        ("lora", "'lora' is not a method"),
    ],
)
def test_options_that_no_file_can_hold_are_refused_before_training(method: Any, text: str) -> None:
    with pytest.raises(InputError, match=text):
        train.attach(make(), method, TARGETS)


def test_a_name_of_no_method() -> None:
    assert train.Nola is kilodelta.train.Nola
    with pytest.raises(AttributeError, match="no attribute 'Dora'"):
        train.Dora  # noqa: B018


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    """A DINOv2 whose files hold the names of before transformers 5: it renames them on loading."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, mlp_ratio=2
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_names_are_the_base_files(vision: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    stored = [name for name in load_file(vision / "model.safetensors") if "query.weight" in name]
    model = transformers.Dinov2Model.from_pretrained(vision).eval()
    assert stored
    assert not set(stored) & set(model.state_dict())
    train.attach(model, train.Lora(rank=1), "*.query.weight", base=vision)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    train.save(model, tmp_path / "task.kd", base=vision)
    kilodelta.merge(vision, tmp_path / "task.kd", tmp_path / "merged")
    merged = transformers.Dinov2Model.from_pretrained(tmp_path / "merged").eval()
    plain = transformers.Dinov2Model.from_pretrained(vision).eval()
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        seen, wanted, before = (m(pixels).last_hidden_state for m in (model, merged, plain))
    assert float((seen - wanted).norm()) < 2e-2 * float((before - wanted).norm())


def test_a_base_without_the_targets_is_refused_before_training(
    vision: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2Model.from_pretrained(vision)
    with pytest.raises(InputError, match="q_proj"):  # its name in memory, not in the files
        train.attach(model, train.Lora(rank=1), "*.q_proj.weight", base=vision)
    other = tmp_path / "other.safetensors"
    save_file({"tall.weight": torch.zeros(15, 8)}, other)
    with pytest.raises(BaseMismatchError, match=r"no tensor wide\.weight"):
        train.attach(make(), train.Lora(rank=1), ["tall.weight", "wide.weight"], base=other)
