"""Train a delta of a few hundred bytes in a plain PyTorch loop, save it, merge it, prove it.

    python examples/train_loop.py [FOLDER]

The model is a small network that has learned one function; the delta teaches it another.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import kilodelta
from kilodelta import train
from kilodelta.verify import prove


def network() -> nn.Module:
    """Make a network of two inputs and one output."""
    return nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
    )


def fit(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, rate: float) -> float:
    """Run the usual loop; return the last loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=rate)
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), y)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return loss.item()


def main(folder: Path) -> None:
    """Train a base, train a delta of it, merge, and prove the result."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    x = torch.rand(512, 2) * 2 - 1
    first, second = torch.sin(3 * x[:, :1]) * x[:, 1:], torch.cos(3 * x[:, :1]) - x[:, 1:]
    model = network()
    print(f"base: loss {fit(model, x, first, steps=400, rate=5e-3):.4f} on its own task")
    base = folder / "base.safetensors"
    save_file(model.state_dict(), base)

    train.attach(model, train.Nola(rank=4, bases=64), "*.weight")
    print(f"delta: loss {nn.functional.mse_loss(model(x), second).item():.4f} before training")
    fit(model, x, second, steps=600, rate=2e-2)
    train.quantise(model, bits=8)  # the last steps run with the numbers that the file will hold
    loss = fit(model, x, second, steps=200, rate=2e-3)
    size = train.save(model, folder / "task.kd", base=base)
    print(f"delta: loss {loss:.4f} after training, {size} bytes on disk")

    kilodelta.merge(base, folder / "task.kd", folder / "merged.safetensors")
    print(f"result: {prove(base, folder / 'task.kd', folder / 'merged.safetensors').result}")
    merged = network()
    merged.load_state_dict(load_file(folder / "merged.safetensors"))
    print(f"merged: loss {nn.functional.mse_loss(merged(x), second).item():.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
