"""Checkpoints as the official NOLA code writes them, and what that code computes from them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support import pico

RANK, BASES, ALPHA = 3, 7, 6.0


class OfficialLinear(torch.nn.Module):
    """What the official code's factor computes, on a CPU: its formula, one torch call a step."""

    def __init__(self, in_: int, out: int, *, start: bool) -> None:
        super().__init__()
        shape = (out, in_)
        weight = torch.randn(shape) * 0.3 if start else torch.zeros(shape)
        seed = torch.randint(int(1e10), (1,))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.seed = torch.nn.Parameter(seed, requires_grad=False)
        self.coefficients = torch.nn.Parameter(torch.randn(BASES))

    def factor(self) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.seed))
            U = torch.zeros(BASES, *self.weight.shape).uniform_(-1.0, 1.0)
        mixed = torch.einsum("b,boi->oi", self.coefficients, U * (1.0 / math.sqrt(BASES)))
        return (mixed + self.weight).detach()


class Layer(torch.nn.Module):
    """One adapted layer; `lora_B` starts at zero, but in the GPT-2 code, whose model initialises
    every linear layer once more."""

    def __init__(self, in_: int, out: int, *, start_b: bool = False) -> None:
        super().__init__()
        self.lora_A = OfficialLinear(in_, RANK, start=True)
        self.lora_B = OfficialLinear(RANK, out, start=start_b)

    def update(self) -> torch.Tensor:
        return ALPHA / RANK * (self.lora_B.factor() @ self.lora_A.factor())


def llama_case(tmp_path: Path) -> tuple[Path, dict[str, Layer], Path]:
    """A pico LLaMA and an adapter folder as the official fork of PEFT saves it."""
    base = pico.llama(tmp_path / "base")
    torch.manual_seed(5)
    tensors = load_file(base / "model.safetensors")
    paths = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    layers = {p: Layer(*reversed(tensors[f"{p}.weight"].shape)) for p in paths}
    folder = tmp_path / "adapter"
    folder.mkdir()
    state = {
        f"base_model.model.{path}.{key}": value
        for path, layer in layers.items()
        for key, value in layer.state_dict().items()
    }
    torch.save(state, folder / "adapter_model.bin")
    config = {"peft_type": "LORA", "use_nola": True, "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return base, layers, folder


def gpt2_case(tmp_path: Path, *, mlp: bool = True) -> tuple[Path, dict[str, Layer], Path]:
    """A pico GPT-2 and a `.pt` as the official script saves it."""
    base = pico.gpt2(tmp_path / "base")
    torch.manual_seed(6)
    layers: dict[str, Layer] = {}
    for i in range(2):
        for part in ("nola_query", "nola_value"):
            layers[f"transformer.h.{i}.attn.{part}"] = Layer(16, 16, start_b=True)
        if mlp:
            layers[f"transformer.h.{i}.mlp.p1_nola"] = Layer(16, 64, start_b=True)
            layers[f"transformer.h.{i}.mlp.p2_nola"] = Layer(64, 16, start_b=True)
    state = {
        f"module.{path}.{key}": value
        for path, layer in layers.items()
        for key, value in layer.state_dict().items()
    }
    torch.save({"model_state_dict": state}, tmp_path / "model.pt")
    return base, layers, tmp_path / "model.pt"
