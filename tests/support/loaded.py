"""A file's tensors as a module in memory; processes of a distributed run import it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kilodelta.files.checkpoint import Checkpoint
from kilodelta.merging.gpu.unit import TORCH


class Model(torch.nn.Module):
    """The tensors of a base file under their own names."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        checkpoint = Checkpoint.open(base)
        self.tensors = {
            name: torch.nn.Parameter(self._read(checkpoint, name), requires_grad=False)
            for name in checkpoint.names
        }

    @staticmethod
    def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
        info = checkpoint.info(name)
        dtype = TORCH.get(info.dtype, torch.int64)
        return torch.from_numpy(checkpoint.data(name).copy()).view(dtype).view(info.shape)

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[Any]:  # names hold dots
        return iter(self.tensors.items())
