"""Choose the device that models compute on, the type of their frozen weights, and the threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import TARGETS, nbytes
from kilodelta.models.weights import TORCH

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where models compute, and in which type their frozen weights are.

    Coefficients, their gradients and the optimiser are float32 everywhere.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The type as users type it."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def choose_placement(device: str, dtype: str, base: Checkpoint) -> Placement:
    """Choose what `auto` means, and refuse what this machine does not have.

    `auto` takes the first CUDA GPU where there is one. Its type is the one that most of the base is
    stored in, where the device multiplies that type in hardware, and float32 otherwise: then no
    weight is rounded, and what is measured is the merged file's values.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto`, `fp32`, `bf16` or `fp16`.
        base: the base model's files.

    Raises:
        InputError: the device or the type is not available here.
    """
    chosen = _device(device)
    if dtype != "auto":
        if dtype == "bf16" and chosen.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise InputError(
                f"{torch.cuda.get_device_name(chosen)} does not compute in bfloat16",
                fix="give --dtype fp16 or fp32",
            )
        return Placement(device=chosen, dtype=DTYPES[dtype])
    stored = stored_type(base)
    return Placement(device=chosen, dtype=stored if _is_fast(stored, chosen) else torch.float32)


def stored_type(base: Checkpoint) -> torch.dtype:
    """Return the float type that takes most of a model's bytes: float32, bfloat16 or float16."""
    sizes: dict[str, int] = dict.fromkeys(sorted(TARGETS), 0)
    for name in base.names:
        info = base.info(name)
        if info.dtype in sizes:
            sizes[info.dtype] += nbytes(info.dtype, info.shape)
    return TORCH[max(sizes, key=lambda dtype: sizes[dtype])]


def _is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a device multiplies matrices of a type in hardware."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported()
    if device.type == "mps":
        return dtype == torch.float16
    return dtype == torch.bfloat16 and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"{name!r} is no device", fix="give auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "torch sees no CUDA GPU",
            fix="give --device cpu, or install a torch with CUDA and a driver",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"there is no {device}: torch sees {torch.cuda.device_count()} GPUs",
            fix="give a smaller N; the first GPU is cuda:0",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("torch sees no Metal GPU", fix="give --device cpu")
    return device


@contextmanager
def on_threads(count: int | None) -> Iterator[None]:
    """Compute on so many threads in this block; on as many as before where `count` is None."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
