"""What is trained in `benchmarks/training.py`: kilodelta's methods, PEFT's, the official NOLA way.

All of them adapt the same matrices: every linear layer inside a BERT encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fidelity_task import base_folder, open_encoder
from torch import Tensor, nn

from kilodelta.compress.training import train

OURS = "encoder.layer.*.weight"
THEIRS = r"encoder\.layer\..*\.(query|key|value|dense)"
RANK, BASES, VERA_RANK, RANDLORA_RANK = 8, 256, 256, 32


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: 6 layers, 384 wide, 36 matrices."""
    return open_encoder(base_folder())[0].train()


def bert12() -> nn.Module:
    """12 layers, 768 wide, 72 matrices; random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model: nn.Module = BertModel(config).train()
    return model


MODELS: Mapping[str, Callable[[], nn.Module]] = {"minilm": minilm, "bert12": bert12}


class Mix(torch.autograd.Function):
    """sum_i c_i U_i, U uniform(-1, 1) drawn from a seed in both passes, as the official code does:
    it keeps no bases between them."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
        """Coefficients (k,), shape (out, in)."""
        ctx.shape, ctx.seed, ctx.count = shape, seed, len(coefficients)
        return torch.einsum("k,koi->oi", coefficients, _bases(len(coefficients), shape, seed))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Gradient (k,)."""
        bases = _bases(ctx.count, ctx.shape, ctx.seed)
        return torch.einsum("koi,oi->k", bases, gradient), None, None


def _bases(count: int, shape: tuple[int, int], seed: int) -> Tensor:
    kept = torch.get_rng_state()
    torch.manual_seed(seed)
    drawn = torch.zeros(count, *shape).uniform_(-1, 1)
    torch.set_rng_state(kept)
    return drawn


class OfficialNola(nn.Module):
    """A linear layer as the official NOLA code has it, with its frozen start A0."""

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.seed = seed
        start = nn.init.kaiming_uniform_(torch.empty(RANK, base.in_features), a=math.sqrt(5))
        self.register_buffer("A0", start)
        self.alpha = nn.Parameter(torch.zeros(BASES))
        self.beta = nn.Parameter(torch.zeros(BASES))

    def forward(self, given: Tensor) -> Tensor:
        """Two thin products beside the frozen one."""
        out, in_ = self.base.out_features, self.base.in_features
        size = 1 / math.sqrt(BASES)
        A = self.A0 + size * Mix.apply(self.alpha, (RANK, in_), self.seed)  # type: ignore[no-untyped-call]
        B = size * Mix.apply(self.beta, (out, RANK), self.seed + 1)  # type: ignore[no-untyped-call]
        result: Tensor = self.base(given) + given @ A.t() @ B.t()
        return result


def official_nola(model: nn.Module) -> nn.Module:
    """Every linear layer of the encoder replaced."""
    model.requires_grad_(False)
    encoder: Any = model.encoder
    linear = [name for name, layer in encoder.named_modules() if isinstance(layer, nn.Linear)]
    for index, name in enumerate(linear):
        encoder.set_submodule(name, OfficialNola(encoder.get_submodule(name), 2 * index))
    return model


def peft(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    """A PEFT adapter on every linear layer of the encoder."""
    import peft as library

    config = getattr(library, f"{kind}Config")(target_modules=THEIRS, **options)
    wrapped: nn.Module = library.get_peft_model(model, config)
    return wrapped


def ours(model: nn.Module, method: Any) -> nn.Module:
    """A kilodelta on every linear layer of the encoder."""
    return train.attach(model, method, OURS)


METHODS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "NOLA": lambda m: ours(m, train.Nola(rank=RANK, bases=BASES)),
    "RandLoRA": lambda m: ours(m, train.RandLora(rank=RANDLORA_RANK)),
    "VeRA": lambda m: ours(m, train.Vera(rank=VERA_RANK)),
    "LoRA r = 1": lambda m: ours(m, train.Lora(rank=1)),
    "LoRA r = 8": lambda m: ours(m, train.Lora(rank=8)),
    "official NOLA": official_nola,
    "PEFT RandLora": lambda m: peft(m, "RandLora", r=RANDLORA_RANK),
    "PEFT VeRA": lambda m: peft(m, "Vera", r=VERA_RANK),
    "PEFT LoRA r = 1": lambda m: peft(m, "Lora", r=1, lora_alpha=1),
    "PEFT LoRA r = 8": lambda m: peft(m, "Lora", r=8, lora_alpha=8),
}
"""By name: makes a model trainable, and returns what is called."""
