"""Run by two processes: compare a sharded stack of blocks with a whole one, and print the result.

It imports torch and no transformers, so that two processes of it take seconds.
"""

from __future__ import annotations

import copy
import json

import torch
from torch import Tensor, nn

from kilodelta.compress.distill.processes.launch import joined
from kilodelta.compress.distill.processes.shards import (
    free,
    is_sharded,
    local_bytes,
    parts_of,
    shard,
)
from kilodelta.compress.training import train
from kilodelta.compress.training.layers import mark_sharded
from kilodelta.files.tying import tied
from kilodelta.models.weights import local, write


class Block(nn.Module):
    """A layer with a bias that trains whole, a matrix of 7 rows, which two do not share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8))
        self.up, self.down = nn.Linear(8, 7), nn.Linear(7, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).tanh()) * self.scale
        return x + y


class Stack(nn.Module):
    """Blocks between an embedding and a head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def outputs_and_gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Compute outputs and all gradients: a NOLA on every matrix, and a bias that trains whole."""
    train.attach(model, train.Nola(rank=2, bases=8), "*.weight", extras="blocks.0.up.bias", seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    found = model(ids)
    found.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    train.detach(model)
    return [found.detach(), *(g.clone() for g in gradients)]


def main() -> None:
    """Print one JSON document in the first process."""
    torch.manual_seed(0)
    whole = Stack()
    other, ids = copy.deepcopy(whole), torch.arange(12).view(2, 6) % 11
    with joined() as ranks:
        parts = parts_of(whole, ["blocks.0.up.bias"])
        shard(whole, ranks, torch.device("cpu"), ["blocks.0.up.bias"])
        held = local_bytes(whole)
        for block in other.blocks:  # so that a layer of few rows takes the same products
            mark_sharded(block)
        ours, theirs = outputs_and_gradients(whole, ids), outputs_and_gradients(other, ids)
        equal = [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]
        state = whole.state_dict()
        new = torch.arange(56.0).view(7, 8)
        write(state["blocks.1.up.weight"], new)
        rows = ranks.gather(local(state["blocks.1.up.weight"]).tolist())
        changed = bool((whole(ids) != other(ids)).any())
        other.state_dict()["blocks.1.up.weight"].copy_(new)
        answer = {
            "whole": parts.whole,
            "divided": parts.divided,
            "held": ranks.gather(held),
            "after a step": ranks.gather(local_bytes(whole)),
            "equal": all(equal),
            "gradients": len(equal) - 1,
            "written": [row for part in rows for row in part] == new.tolist(),
            "changed": changed,
            "as written": torch.equal(whole(ids), other(ids)),
            "tied": sorted(tied(state)),
            "sharded": [is_sharded(whole), is_sharded(other)],
        }
        free(whole)
        answer["freed"] = sum(local(p).untyped_storage().nbytes() for p in whole.parameters())
        if ranks.writes:
            print(json.dumps(answer))


if __name__ == "__main__":
    main()
