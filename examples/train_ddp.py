"""Train a delta on several processes: what they exchange at every step is kilobytes.

    torchrun --standalone --nproc-per-node=2 examples/train_ddp.py [FOLDER]

The base does not change, so DistributedDataParallel reduces the gradients of the coefficients only.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kilodelta import train


def main(folder: Path) -> None:
    """Train in every process on other rows; the first one saves."""
    folder.mkdir(parents=True, exist_ok=True)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same base everywhere
    model = nn.Sequential(
        nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 4)
    )
    target = nn.Linear(16, 4)
    train.attach(model, train.Nola(rank=4, bases=128), "*.weight")
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped = DistributedDataParallel(model)
    optimiser = torch.optim.Adam(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(1 + rank)
    for step in range(200):
        x = torch.randn(64, 16, generator=generator)
        loss = nn.functional.mse_loss(wrapped(x), target(x).detach())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if rank == 0 and step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    if rank == 0:
        sent = 4 * sum(p.numel() for p in trained)
        size = train.save(model, folder / "task.kd", bits=8)
        print(f"{world} processes, {sent} bytes of gradients a step; {size} bytes saved")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
