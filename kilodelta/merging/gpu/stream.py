"""Merge a tensor in host memory through a device, one band of rows after the other.

Two lanes take turns: while one's band is copied in, merged and copied out on a separate CUDA
stream, the caller writes and hashes the other's. Host buffers are pinned, so that copies run
asynchronously; nothing larger than two bands and the two factors is ever on the device.
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
from kilodelta.merging.cpu import ByteSource
from kilodelta.merging.gpu.choose import unit_for
from kilodelta.merging.gpu.device_update import DeviceUpdate
from kilodelta.merging.gpu.unit import TORCH

BAND = 16 << 20
"""Bytes of a band; it has at least one row."""

Merge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From weights on the device to new ones, and a flag (1,), not zero where one is not finite."""


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
        """Wait, on the device, for work that the caller has begun there."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def start(self, band: Bytes, dtype: torch.dtype, columns: int, merge: Merge) -> None:
        """Send a band through the device; the host does not wait.

        Args:
            band: raw bytes, uint8 (n,).
            dtype: of the weights.
            columns: of the stored matrix.
            merge: what is done with the weights.
        """
        self._size = band.size
        self._in.numpy()[: band.size] = band
        with self._turn():
            held = self._in[: band.size].to(self._device, non_blocking=True)
            out, flag = merge(held.view(dtype).view(-1, columns))
            raw = out.view(-1).view(torch.uint8)
            self._out[: band.size].copy_(raw, non_blocking=True)
            self._flag.copy_(flag, non_blocking=True)

    def finish(self) -> tuple[Bytes, bool]:
        """Wait for the band.

        Returns:
            Its merged bytes, valid until the next `start`, and whether all weights are finite.
        """
        if self._stream is not None:
            self._stream.synchronize()
        merged: Bytes = self._out.numpy()[: self._size]
        return merged, int(self._flag) == 0


def merged(
    delta: Delta, target: Target, base: ByteSource, device: torch.device, band: int = BAND
) -> Iterator[Bytes]:
    """Yield the merged tensor's bytes in order, as `kilodelta.merging.cpu.merged` does.

    A piece is overwritten by the next but one.

    Args:
        delta: bound to the base, of an exact method.
        target: one of its targets.
        base: the base tensor's raw bytes.
        device: where it is merged.
        band: bytes of a piece, about.

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
    # The columns' factor was drawn on the caller's stream, and both lanes read it.
    for lane in lanes:
        lane.after(device)
    waiting: list[Lane] = []
    for turn, top in enumerate(range(0, rows, step)):
        span, lane = range(top, min(rows, top + step)), lanes[turn % 2]
        part = base[span.start * row : span.stop * row]
        # This lane's last band has been finished a turn ago, so its buffers are free.
        lane.start(part, TORCH[target.dtype], columns, _merge(update, span, range(columns)))
        waiting.append(lane)
        if len(waiting) > 1:
            yield _checked(waiting.pop(0), delta, target, base)
    yield _checked(waiting.pop(0), delta, target, base)


def _merge(update: DeviceUpdate, rows: range, columns: range) -> Merge:
    return lambda weights: update.merge(weights, rows, columns)


def _checked(lane: Lane, delta: Delta, target: Target, base: ByteSource) -> Bytes:
    merged, is_finite = lane.finish()
    if not is_finite:
        raise_not_finite(delta, target, base)
    return merged


def raise_not_finite(delta: Delta, target: Target, base: ByteSource) -> None:
    """Find out on the CPU why a merge is not finite, and raise its error.

    Raises:
        CheckpointError: the base tensor holds NaN or infinity.
        ProofError: the update takes a finite weight out of its type's range.
        SelfTestError: the CPU finds every number finite.
    """
    for _ in cpu.merged(delta, target, base):
        pass
    raise SelfTestError(
        f"{target.name} is not finite by the device, and finite by the CPU",
        fix="merge with device cpu, and report this GPU with its driver and versions",
    )
