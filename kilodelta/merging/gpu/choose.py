"""Choose the unit for a device, and prove it there."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch

from kilodelta.errors import InputError
from kilodelta.format.methods import Method
from kilodelta.merging.gpu.on_torch import TorchUnit
from kilodelta.merging.gpu.selftest import require_good_unit
from kilodelta.merging.gpu.unit import Unit


def device_named(name: str) -> torch.device:
    """Return a device that this machine has.

    Raises:
        InputError: it has not, or kilodelta cannot merge on such a device.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{name!r} is not a device", fix="cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"kilodelta does not merge on {name!r}", fix="cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise InputError(
            f"torch sees {count} CUDA devices, not {name!r}",
            fix="kilodelta doctor says what is missing; without a GPU use device cpu",
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def unit_for(device: torch.device, method: Method) -> Unit:
    """Return Triton's kernels on CUDA where Triton is installed, else torch operations, proved.

    Args:
        device: CPU or CUDA.
        method: whose kernels are proved; once per process, device and variant.

    Raises:
        SelfTestError: the device does not compute as the CPU's kernels do.
    """
    return _proved(device, method.name, method.variant)


@lru_cache(maxsize=64)
def _proved(device: torch.device, method: str, variant: str) -> Unit:
    unit = _unit(device)
    require_good_unit(unit, method, variant)
    return unit


def _unit(device: torch.device) -> Unit:
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from kilodelta.merging.gpu.on_triton import TritonUnit

        return TritonUnit(device)
    return TorchUnit(device)
