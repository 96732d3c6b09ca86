"""Plain modules of torch, as a user builds them: every kind of layer, each with a linear head.

Their files are bare `.safetensors`, and `--model tests.models.architectures.modules:NAME` names the
function that builds them. `x` is float32 `(rows, 6, length)`, for images `(rows, 6, 8, 10)` and for
volumes `(rows, 6, 4, 6, 8)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.models.architectures.architecture import Architecture, Batch

_CHANNELS, _WIDTH = 6, 8


class _Headed(nn.Module):
    """A layer; the average of what it puts out, after a nonlinearity, goes into a linear head."""

    def __init__(self, layer: nn.Module, width: int = _WIDTH) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states = torch.tanh(self.layer(x))
        return {"logits": self.head(states.flatten(2).mean(2)), "states": states}


class _Recurrent(_Headed):
    """A recurrent layer over `(rows, length, channels)`."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states, _ = self.layer(x.transpose(1, 2))
        return {"logits": self.head(states.mean(1)), "states": states}


class _Attending(_Headed):
    """Attention of a sequence to itself."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.transpose(1, 2)
        states = self.layer(x, x, x, need_weights=False)[0]
        return {"logits": self.head(states.mean(1)), "states": states}


class _Encoder(_Headed):
    """torch's own encoder layer."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states = self.layer(x.transpose(1, 2))
        return {"logits": self.head(states.mean(1)), "states": states}


class _Bilinear(_Headed):
    """A product of every position with itself, through a tensor of three axes."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = x.transpose(1, 2).contiguous()
        states = self.layer(x, x)
        return {"logits": self.head(states.mean(1)), "states": states}


def conv1d() -> nn.Module:
    return _Headed(nn.Conv1d(_CHANNELS, _WIDTH, 3, padding=1))


def conv2d() -> nn.Module:
    return _Headed(nn.Conv2d(_CHANNELS, _WIDTH, (3, 2), stride=2))


def conv3d() -> nn.Module:
    return _Headed(nn.Conv3d(_CHANNELS, _WIDTH, 2))


def depthwise() -> nn.Module:
    return _Headed(nn.Conv1d(_CHANNELS, _CHANNELS, 3, groups=_CHANNELS), _CHANNELS)


def grouped() -> nn.Module:
    return _Headed(nn.Conv2d(_CHANNELS, _WIDTH, 3, groups=2))


def transposed1d() -> nn.Module:
    return _Headed(nn.ConvTranspose1d(_CHANNELS, _WIDTH, 4, stride=2))


def transposed2d() -> nn.Module:
    return _Headed(nn.ConvTranspose2d(_CHANNELS, _WIDTH, 3, stride=2))


def normed() -> nn.Module:
    """A convolution in front of a batch norm, which runtimes fold into it."""
    return _Headed(nn.Sequential(nn.Conv2d(_CHANNELS, _WIDTH, 3), nn.BatchNorm2d(_WIDTH)))


def weight_norm() -> nn.Module:
    """A convolution whose weight is computed of a direction and a length."""
    return _Headed(parametrizations.weight_norm(nn.Conv1d(_CHANNELS, _WIDTH, 3)))


def lstm() -> nn.Module:
    return _Recurrent(nn.LSTM(_CHANNELS, _WIDTH, batch_first=True))


def bilstm() -> nn.Module:
    return _Recurrent(nn.LSTM(_CHANNELS, 4, batch_first=True, bidirectional=True))


def gru() -> nn.Module:
    return _Recurrent(nn.GRU(_CHANNELS, _WIDTH, batch_first=True))


def rnn() -> nn.Module:
    return _Recurrent(nn.RNN(_CHANNELS, _WIDTH, batch_first=True))


def attention() -> nn.Module:
    return _Attending(nn.MultiheadAttention(_CHANNELS, 2, batch_first=True), _CHANNELS)


def encoder_layer() -> nn.Module:
    return _Encoder(nn.TransformerEncoderLayer(_CHANNELS, 2, 12, batch_first=True), _CHANNELS)


def bilinear() -> nn.Module:
    return _Bilinear(nn.Bilinear(_CHANNELS, _CHANNELS, _WIDTH))


def _values(*shape: int) -> Callable[[int, int], Batch]:
    """Random `x`; a side of 0 is the batch's size."""

    def make(rows: int, size: int) -> Batch:
        chance = torch.Generator().manual_seed(rows + size)
        return {"x": torch.randn(rows, *(side or size for side in shape), generator=chance)}

    return make


def _row(make: Callable[[], nn.Module], label: str, *shape: int) -> Architecture:
    options: dict[str, Any] = {}
    sizes = ((1, 6), (2, 9), (3, 17)) if 0 in shape else ((1, 0), (2, 0), (5, 0))
    return Architecture(make.__name__.replace("_", "-"), label, "", options, _values(*shape), sizes)


_LINE, _PLANE, _VOLUME = (_CHANNELS, 0), (_CHANNELS, 8, 10), (_CHANNELS, 4, 6, 8)

ROWS: tuple[Architecture, ...] = (
    _row(conv1d, "Conv1d", *_LINE),
    _row(conv2d, "Conv2d", *_PLANE),
    _row(conv3d, "Conv3d", *_VOLUME),
    _row(depthwise, "Conv1d, a group per channel", *_LINE),
    _row(grouped, "Conv2d, two groups", *_PLANE),
    _row(transposed1d, "ConvTranspose1d", *_LINE),
    _row(transposed2d, "ConvTranspose2d", *_PLANE),
    _row(normed, "Conv2d, BatchNorm2d", *_PLANE),
    _row(weight_norm, "weight_norm(Conv1d)", *_LINE),
    _row(lstm, "LSTM", *_LINE),
    _row(bilstm, "LSTM, both directions", *_LINE),
    _row(gru, "GRU", *_LINE),
    _row(rnn, "RNN", *_LINE),
    _row(attention, "MultiheadAttention", *_LINE),
    _row(encoder_layer, "TransformerEncoderLayer", *_LINE),
    _row(bilinear, "Bilinear", *_LINE),
)
