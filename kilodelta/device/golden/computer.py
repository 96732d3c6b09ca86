"""Say what computes here: everything that may change the last bits of a result.

A runtime picks kernels by the processor's features and splits sums by the number of threads, so the
same model and the same runtime give other bits on another processor, core count or GPU.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from kilodelta.export.tensorrt.cuda import CudaError, driver

_CPUINFO = Path("/proc/cpuinfo")
_FIELDS = frozenset(
    {
        "vendor_id", "cpu family", "model", "model name", "stepping", "flags",  # x86
        "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision",
        "Features",  # ARM
    }
)  # fmt: skip
"""What `/proc/cpuinfo` says of the kind of processor, not of its clock or of one core."""


def computer(runtime: str) -> str:
    """Return a runtime and its version with the processor, cores and GPUs that it computes on.

    Args:
        runtime: such as `onnxruntime-cuda 1.32.0`; GPUs count only if it uses them.

    Example:
        >>> computer("onnxruntime-cpu 1.32.0").partition(";")[0]
        'onnxruntime-cpu 1.32.0'
    """
    parts = [
        runtime,
        f"{platform.system()} {platform.machine()}",
        _processor(),
        f"{_cores()} cores",
    ]
    if not runtime.startswith("onnxruntime-cpu"):
        parts.append(_gpus())
    return "; ".join(parts)


def _processor() -> str:
    """Digest the kinds of processor in this machine; their name where Linux does not say."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    pairs = (line.partition(":") for line in lines)
    kinds = sorted({f"{key.strip()}:{value}" for key, _, value in pairs if key.strip() in _FIELDS})
    return f"processor {hashlib.sha256(chr(10).join(kinds).encode()).hexdigest()[:16]}"


def _cores() -> int:
    """Cores that this process may use: they decide how many threads a runtime takes."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> str:
    try:
        cuda = driver()
        names = ", ".join(f"{gpu.name} {gpu.sm}" for gpu in cuda.gpus())
        return f"{names or 'no GPU'}, CUDA {'.'.join(map(str, cuda.version()))}"
    except CudaError:
        return "no GPU"
