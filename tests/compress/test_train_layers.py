"""Every kind of layer that has a matrix: attached, it computes what the merged weight would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

from kilodelta.compress.training import train
from kilodelta.format.methods import Lora, Method, Nola

Call = Callable[[nn.Module], Tensor]


class ByHand(nn.Module):
    """Parameters used in a forward pass by hand: alone, in a list, three-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(6, 8))
        self.several = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
        self.experts = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.mix.t() @ self.several[0] @ self.several[1]
        return torch.einsum("...i,eij->...ej", hidden, self.experts)


class Cross(nn.Module):
    """Attention whose keys and values have other widths than the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x[..., :6], x[..., :5], need_weights=False)[0]
        return output


class Self(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return output


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.decoder(x, x * 0.5)
        return output


class Recurrent(nn.Module):
    """A recurrent layer, of whose outputs the sequence is taken."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


class Cells(nn.Module):
    """Recurrent cells, called for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(8, 6), nn.GRUCell(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        state, hidden = None, None
        for step in x.unbind(1):
            state = self.lstm(step, state)
            hidden = self.gru(state[0], hidden)
        assert hidden is not None
        return torch.as_tensor(hidden)


def normed(norm: Any) -> nn.Module:
    module: nn.Module = norm(nn.Linear(8, 6))
    return module


IMAGES = (2, 8, 5, 5)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), (2, 3, 8)),
    "bilinear": (lambda: nn.Bilinear(8, 8, 6), (2, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, stride=2, padding=1), (2, 8, 7)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (2, 3), dilation=2, padding=2), IMAGES),
    "conv2d-same": (lambda: nn.Conv2d(8, 6, 3, padding="same"), IMAGES),
    "conv2d-reflect": (lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), IMAGES),
    "conv2d-grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), IMAGES),
    "conv2d-one-image": (lambda: nn.Conv2d(8, 6, 3), (8, 5, 5)),
    "conv1d-depthwise": (lambda: nn.Conv1d(8, 8, 4, groups=8), (2, 8, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, groups=2), (2, 2, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 6, 3, stride=2), IMAGES),
    "transposed-grouped": (lambda: nn.ConvTranspose1d(8, 12, 3, groups=2), (2, 8, 7)),
    "by-hand": (ByHand, (2, 8)),
    "attention": (Self, (2, 3, 8)),
    "attention-cross": (Cross, (2, 3, 8)),
    "decoder": (Decoder, (2, 3, 8)),
    "rnn": (lambda: Recurrent(nn.RNN(8, 6)), (3, 2, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM(8, 6, num_layers=2, batch_first=True)), (2, 3, 8)),
    "lstm-projected": (lambda: Recurrent(nn.LSTM(8, 6, proj_size=4)), (3, 2, 8)),
    "gru-both-ways": (lambda: Recurrent(nn.GRU(8, 6, bidirectional=True)), (3, 2, 8)),
    "cells": (Cells, (2, 3, 8)),
    "weight-norm": (lambda: normed(nn.utils.parametrizations.weight_norm), (2, 8)),
    "spectral-norm": (lambda: normed(nn.utils.spectral_norm), (2, 8)),
}
METHODS: tuple[Method, ...] = (Lora(rank=2), Nola(rank=2, bases=20))


def trained(model: nn.Module, method: Method, globs: str = "*") -> nn.Module:
    """Attach, with coefficients as if they had been trained, rounded as the file rounds them."""
    train.attach(model, method, globs)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    train.quantise(model, 8)
    return model


def merged(base: nn.Module, attached: nn.Module) -> nn.Module:
    """The base with every update added to its weight: what a merged file holds."""
    delta = train.to_delta(attached)
    state = base.state_dict()
    for name, target in delta.targets.items():
        update = torch.from_numpy(delta.update(name))
        change = update.t() if target.transposed else update
        place = state[target.tensor]
        place = place if target.part is None else place[target.part]
        place += change.reshape(place.shape)
    base.load_state_dict(state)
    return base


def agree(attached: nn.Module, wanted: nn.Module, base: nn.Module, call: Call) -> None:
    """The attached model's output is the merged one's, and not the base's."""
    found, expected, before = call(attached), call(wanted), call(base)
    effect = float((expected - before).detach().norm())
    assert effect > 1e-2, "the update has no effect: this proves nothing"
    # sums of some hundred float32 products in another order
    assert float((found - expected).detach().norm()) < 1e-4 * effect


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", LAYERS)
def test_an_attached_layer_is_the_merged_one(name: str, method: Method, mode: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    base = make().train(mode == "train")
    given = torch.randn(shape)
    several = (given, given) if name == "bilinear" else (given,)
    attached = trained(copy.deepcopy(base), method)
    wanted = merged(copy.deepcopy(base), attached)
    with torch.no_grad() if mode == "no_grad" else torch.enable_grad():
        # spectral_norm moves its power iteration at each call in training: each model calls once
        agree(attached, wanted, base, lambda model: model(*several))
    if mode != "no_grad":
        attached(*several).square().sum().backward()
        gradients = [p.grad for n, p in attached.named_parameters() if "kilodelta" in n]
        assert gradients
        assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients)


def test_embeddings_of_both_kinds() -> None:
    ids = torch.tensor([[1, 4, 4], [0, 2, 6]])
    for base in (nn.Embedding(7, 6, padding_idx=0), nn.EmbeddingBag(7, 6, mode="mean")):
        attached = trained(copy.deepcopy(base), Lora(rank=2))
        wanted = merged(copy.deepcopy(base), attached)
        agree(attached, wanted, base, lambda model: model(ids))


def encoder(*, norm_first: bool = False, nested: bool = True) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        16, 4, 24, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "globs", ["*weight", "*linear1.weight", "*self_attn.*weight", "layers.1.*weight"]
)
def test_the_fast_path_of_an_encoder(globs: str, padded: bool, context: str) -> None:
    """torch's fused path calls no layer, and turns a padded batch into a nested tensor."""
    base = encoder()
    attached = trained(encoder(), Lora(rank=2), globs)
    wanted = merged(encoder(), attached)
    torch.manual_seed(4)
    given, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 4:] = True
    if context == "grad" and padded:  # torch itself fails where the first layer is frozen
        for model in (base, wanted):
            model.requires_grad_(True)

    def call(model: nn.Module) -> Tensor:
        output: Tensor = model(given, src_key_padding_mask=mask if padded else None)
        return output

    with CONTEXTS[context]():
        agree(attached, wanted, base, call)
        if padded and context != "grad":
            assert not call(attached)[1, 3:].any()  # torch's own zeros at padded places


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_an_encoder_keeps_its_own_and_its_owners_hooks() -> None:
    model: Any = encoder()
    seen: list[str] = []
    model.layers[0].linear1.register_forward_hook(lambda *_: seen.append("mine"))
    before = [list(m._forward_hooks) for m in model.modules()]
    trained(model, Lora(rank=2))
    hooks = [list(m._forward_hooks.values()) for m in model.modules()]
    given = torch.randn(2, 4, 16)
    with torch.no_grad():
        model(given)
    assert [list(m._forward_hooks.values()) for m in model.modules()] == hooks
    assert seen == ["mine"]  # a hook of somebody else makes torch take the slow path, as before
    with pytest.raises((RuntimeError, AssertionError)):
        model(given[..., :3])
    assert [list(m._forward_hooks.values()) for m in model.modules()] == hooks
    assert not any("weight" in vars(m) for m in model.modules())
    train.detach(model)
    assert [list(m._forward_hooks) for m in model.modules()] == before


def test_an_encoder_in_training_learns_through_checkpoints() -> None:
    """Layers are computed again in the backward pass, outside of the encoder's own call."""
    from torch.utils.checkpoint import checkpoint

    class Sparing(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer, self.self_attn = layer, layer.self_attn  # the encoder looks at its layers

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            return checkpoint(self.layer, x, use_reentrant=False)

    given, gradients = torch.randn(2, 4, 16), []
    for sparing in (False, True):
        model: Any = trained(encoder(), Lora(rank=2), "*linear1.weight").train()
        if sparing:
            model.layers = nn.ModuleList(Sparing(layer) for layer in model.layers)
        model(given).square().sum().backward()
        gradients.append([p.grad for n, p in model.named_parameters() if "kilodelta" in n])
    assert gradients[0]
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None
        assert again is not None
        assert torch.allclose(plain, again, rtol=1e-5)
        assert plain.abs().sum() > 0
