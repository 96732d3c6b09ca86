"""Merging a tensor that lies in host memory through a device, a band of rows at a time.

Two lanes take turns: while one's band is copied in, merged and copied out on its own CUDA stream,
the caller writes and hashes the other's. Host buffers are pinned, so that the copies run by
themselves; nothing larger than a band and the two factors is ever on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from kilodelta.errors import SelfTestError
from kilodelta.files.tensor import Bytes
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.merging import cpu
from kilodelta.merging.cpu import Source
from kilodelta.merging.gpu.choose import unit_for
from kilodelta.merging.gpu.device_update import DeviceUpdate
from kilodelta.merging.gpu.unit import TORCH

BAND = 16 << 20
"""Bytes of a band, at least one row."""

Merge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From weights on the device to new ones, and a flag (1,) that is not zero where they are not
finite."""


class Lane:
    """Buffers for one band, and the stream that fills and empties them."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        on_gpu = device.type == "cuda"
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._in = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._out = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._flag = torch.empty(1, dtype=torch.int32, pin_memory=on_gpu)
        self._size = 0

    def _turn(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def after(self, device: torch.device) -> None:
        """Let work that the caller has begun on the device end first."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def start(self, band: Bytes, dtype: torch.dtype, columns: int, merge: Merge) -> None:
        """Set off a band's way through the device; the host does not wait."""
        self._size = band.size
        self._in.numpy()[: band.size] = band
        with self._turn():
            held = self._in[: band.size].to(self._device, non_blocking=True)
            out, flag = merge(held.view(dtype).view(-1, columns))
            raw = out.view(-1).view(torch.uint8)
            self._out[: band.size].copy_(raw, non_blocking=True)
            self._flag.copy_(flag, non_blocking=True)

    def finish(self) -> tuple[Bytes, bool]:
        """Wait for the band: its merged bytes, valid until the next start, and whether all of them
        are finite."""
        if self._stream is not None:
            self._stream.synchronize()
        found: Bytes = self._out.numpy()[: self._size]
        return found, int(self._flag) == 0


def merged(
    delta: Delta, target: Target, base: Source, device: torch.device, band: int = BAND
) -> Iterator[Bytes]:
    """The merged tensor's bytes in order, as `kilodelta.merging.cpu.merged` gives them; a
    piece is overwritten by the next but one.

    Raises:
        CheckpointError: the base tensor holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.
        SelfTestError: the device computes wrongly.
    """
    update = DeviceUpdate(delta, target, unit_for(device, delta.method))
    rows, columns = target.stored
    row = base.size // rows
    step = min(rows, max(1, band // row))
    update.prepare(range(columns))
    lanes = [Lane(device, step * row) for _ in range(2 if step < rows else 1)]
    for lane in lanes:
        lane.after(device)
    waiting: list[Lane] = []
    for turn, top in enumerate(range(0, rows, step)):
        span, lane = range(top, min(rows, top + step)), lanes[turn % 2]
        part = base[span.start * row : span.stop * row]
        lane.start(part, TORCH[target.dtype], columns, _merge(update, span, range(columns)))
        waiting.append(lane)
        if len(waiting) > 1:
            yield _checked(waiting.pop(0), delta, target, base)
    yield _checked(waiting.pop(0), delta, target, base)


def _merge(update: DeviceUpdate, rows: range, columns: range) -> Merge:
    return lambda weights: update.merge(weights, rows, columns)


def _checked(lane: Lane, delta: Delta, target: Target, base: Source) -> Bytes:
    found, is_finite = lane.finish()
    if not is_finite:
        raise_not_finite(delta, target, base)
    return found


def raise_not_finite(delta: Delta, target: Target, base: Source) -> None:
    """Say why a merge is not finite, as the CPU says it.

    Raises:
        CheckpointError: the base tensor holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.
        SelfTestError: the CPU finds every number finite.
    """
    for _ in cpu.merged(delta, target, base):
        pass
    raise SelfTestError(
        f"the device says that {target.name} is not finite, and the CPU that it is",
        fix="merge with device cpu, and report this GPU with its driver and versions",
    )
