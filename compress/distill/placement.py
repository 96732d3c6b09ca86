"""Choose the device that models compute on, the type of their frozen weights, and the threads."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from kilodelta.compress.distill.planning.memory import available
from kilodelta.compress.training.products.rounded import FLOAT32, INT8
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import TARGETS, nbytes
from kilodelta.models.weights import TORCH
from kilodelta.sizes import byte_label

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXED = {"mixed": "bfloat16", "mixed-int8": INT8}
"""Float32, but for the products of a training with frozen weights, which are in these types."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where models compute, and in which type their frozen weights are.

    Coefficients, their gradients and the optimiser are float32 everywhere.

    Attributes:
        device: of both models.
        dtype: of frozen weights in memory, and of what is computed with them.
        products: the types in which training may multiply with weights that are float32, the
            fastest first; the first that suits the model is taken.
    """

    device: torch.device
    dtype: torch.dtype
    products: tuple[str, ...] = (FLOAT32,)

    @property
    def name(self) -> str:
        """The type as users type it."""
        known = (name for name, dtype in DTYPES.items() if dtype == self.dtype)
        mixed = (name for name, products in MIXED.items() if products == self.products[0])
        return next(mixed, None) or next(known)

    def training_in(self, products: str) -> str:
        """Name the type, as users type it, of a training that multiplies in one of `products`.

        Example:
            >>> placement = Placement(device=torch.device("cpu"), dtype=torch.float32)
            >>> placement.training_in("int8"), placement.training_in("float32")
            ('mixed-int8', 'fp32')
        """
        return replace(self, products=(products,)).name


def choose_placement(device: str, dtype: str, base: Checkpoint) -> Placement:
    """Choose what `auto` means, and refuse what this machine does not have.

    `auto` takes the first CUDA GPU where there is one. Its type is the one that most of the base is
    stored in, where the device multiplies that type in hardware, and float32 otherwise: then no
    weight is rounded, and what is measured is the merged file's values. Of a float32 base on a CPU,
    the products of the training are in what the CPU has units for: 8-bit integers where that suits
    the model (`learn/suiting.py`), else bfloat16.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto`, `fp32`, `mixed`, `mixed-int8`, `bf16` or `fp16`.
        base: the base model's files.

    Raises:
        InputError: the device or the type is not available here.
    """
    chosen = _device(device)
    if dtype != "auto":
        if dtype == "fp16" and chosen.type == "cpu":
            raise InputError(
                "training in float16 needs a GPU: a CPU multiplies it slowly",
                fix="give --dtype bf16, fp32 or auto",
            )
        if dtype == "bf16" and chosen.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise InputError(
                f"{torch.cuda.get_device_name(chosen)} does not compute in bfloat16",
                fix="give --dtype fp16 or fp32",
            )
        if dtype in MIXED:
            _require_mixed(dtype, chosen, base)
            return Placement(device=chosen, dtype=torch.float32, products=(MIXED[dtype],))
        return Placement(device=chosen, dtype=DTYPES[dtype])
    stored = stored_type(base)
    # On a GPU float32 products are fast enough by themselves, and nothing was measured.
    may_narrow = stored == torch.float32 and chosen.type == "cpu"
    fast = [name for name in (INT8, "bfloat16") if may_narrow and _has_units(name, chosen)]
    return Placement(
        device=chosen,
        dtype=stored if _is_fast(stored, chosen) else torch.float32,
        products=(*fast, FLOAT32),
    )


def stored_type(base: Checkpoint) -> torch.dtype:
    """Return the float type that takes most of a model's bytes: float32, bfloat16 or float16."""
    sizes: dict[str, int] = dict.fromkeys(sorted(TARGETS), 0)
    for name in base.names:
        info = base.info(name)
        if info.dtype in sizes:
            sizes[info.dtype] += nbytes(info.dtype, info.shape)
    return TORCH[max(sizes, key=lambda dtype: sizes[dtype])]


def require_weights_fit(base: Checkpoint, placement: Placement) -> None:
    """Check that the weights fit beside what else is in memory, before they are loaded.

    On a CPU, weights that are computed with in the file's own type are mapped: the system takes
    such memory back when it is short, so they are not counted.

    Args:
        base: the base's files.
        placement: where it is to compute, and in which type.

    Raises:
        InputError: they do not; both numbers are said.
    """
    free = available(placement.device)
    copied = _copied_bytes(base, placement)
    if free is None or copied <= free:
        return
    stored = Placement(device=placement.device, dtype=stored_type(base)).name
    can_map = placement.device.type == "cpu" and stored not in (placement.name, "fp16")
    raise InputError(
        f"the weights of {base.path} take {byte_label(copied)} in {placement.name}, and"
        f" {byte_label(free)} are free",
        fix=f"give --dtype {stored}, the type of the files, which are then mapped and not copied"
        if can_map
        else "give --device cpu, or a device with more memory",
    )


def wants_shards(base: Checkpoint, placement: Placement) -> bool:
    """Return whether a base is better divided among processes, for `--shard auto`.

    On a CPU all processes map the same pages, so none of them holds more for holding all. On a GPU
    a part is fetched for every layer of every pass, which is worth its time where the whole base
    would leave less than half of the memory for the activations.
    """
    free = available(placement.device)
    if placement.device.type == "cpu" or free is None:
        return False
    return 2 * _copied_bytes(base, placement) > free


def _copied_bytes(base: Checkpoint, placement: Placement) -> int:
    """Add up the bytes of the weights that memory of the process, or of a GPU, has to hold."""
    total = 0
    for info in map(base.info, base.names):
        stored = TORCH.get(info.dtype)
        if stored is None or not stored.is_floating_point:
            continue
        if placement.device.type != "cpu" or stored != placement.dtype:
            total += info.nbytes // stored.itemsize * placement.dtype.itemsize
    return total


def _is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a device multiplies matrices of a type in hardware."""
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported()
    if device.type == "mps":
        return dtype == torch.float16
    return dtype == torch.bfloat16 and _cpu_has_bfloat16()


def _cpu_has_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16: by AVX512-BF16, AMX, or ARM's units."""
    known = _capabilities()
    if known.get("architecture") in ("aarch64", "arm64"):
        # torch's builds for macOS multiply bfloat16 without these units.
        return sys.platform == "linux" and bool(known.get("bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _capabilities() -> dict[str, Any]:
    """Return what torch knows of the processor; an older one knows less, and says nothing."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known


def _cpu_has_int8() -> bool:
    """Return whether this processor adds up 8-bit products exactly and fast: x86-64 with VNNI.

    Without it oneDNN, which multiplies them, adds in 16 bits, where sums can saturate.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    known = _capabilities()
    if known:
        return any(known.get(units) for units in ("avx512_vnni", "avx_vnni", "amx_int8"))
    return torch.cpu._is_vnni_supported()


def _has_units(products: str, device: torch.device) -> bool:
    """Return whether a device has units for products of a type that is narrower than float32."""
    if products == INT8:
        return device.type == "cpu" and _cpu_has_int8()
    return _is_fast(torch.bfloat16, device)


def _require_mixed(dtype: str, device: torch.device, base: Checkpoint) -> None:
    """Check that products in a narrow type beside float32 weights are worth anything.

    Raises:
        InputError: the device is slow at them, or the base is not stored in float32.
    """
    if not _has_units(MIXED[dtype], device):
        raise InputError(
            f"--dtype {dtype} multiplies in {MIXED[dtype]}, for which this device has no units",
            fix="give --dtype fp32 or auto",
        )
    if (stored := stored_type(base)) != torch.float32:
        name = Placement(device=device, dtype=stored).name
        raise InputError(
            f"--dtype {dtype} is for a base in float32, and {base.path} is stored in {name}",
            fix="give --dtype auto, fp32 or bf16",
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    is_numbered = device is not None and device.index is not None
    if device is None or device.type not in (("cuda",) if is_numbered else ("cpu", "cuda", "mps")):
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
def own_settings(threads: int | None) -> Iterator[None]:
    """Compute in this block as kilodelta does, whatever the caller has told torch.

    A notebook may have turned gradients off, or computing in bfloat16 on: the first would end a
    training, the second change its result and every number that is measured.

    Args:
        threads: cores to compute on; as many as before where it is None.
    """
    cores, dtype, device = (
        torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()
    )  # fmt: skip
    moved = device.type != "cpu"
    torch.set_num_threads(cores if threads is None else threads)
    torch.set_default_dtype(torch.float32)
    if moved:
        torch.set_default_device(None)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for kind in ("cpu", "cuda", "mps"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_num_threads(cores)
        torch.set_default_dtype(dtype)
        if moved:
            torch.set_default_device(device)
