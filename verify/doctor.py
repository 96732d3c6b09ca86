"""What this machine can do, and the command that installs what it lacks.

Nothing heavy is imported: versions come from package metadata, the GPU from the driver, and only
ONNX Runtime and TensorRT are asked themselves, each in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import asdict, dataclass

import kilodelta
from kilodelta.verify.cuda import CudaError, Driver, Gpu, driver
from kilodelta.verify.probe import Answer, ask, distributions, torch_cuda, version
from kilodelta.verify.result import Json
from kilodelta.verify.tables import Table

OK, MISSING, BROKEN, CONFLICT = "ok", "missing", "broken", "conflict"

_PACKAGES = {
    "numba": "kilodelta",
    "torch": "kilodelta[torch]",
    "transformers": "kilodelta[hf]",
    "peft": "kilodelta[peft]",
    "onnx": "kilodelta[onnx]",
    "onnxscript": "kilodelta[onnx]",
}
_TENSORRT = {
    "tensorrt": "NVIDIA's JetPack, container or apt packages; pip install 'kilodelta[tensorrt]'",
    "tensorrt_rtx": "pip install 'kilodelta[rtx]'",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing on this machine: what it is, whether it works, and how to mend it."""

    topic: str
    status: str
    value: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """All findings."""

    findings: tuple[Finding, ...]

    def __getitem__(self, topic: str) -> Finding:
        return next(finding for finding in self.findings if finding.topic == topic)

    def to_json(self) -> Json:
        return {"findings": [asdict(finding) for finding in self.findings]}

    def tables(self) -> tuple[Table, ...]:
        """One table with every finding."""
        rows = tuple((f.topic, f.status, f.value, f.fix) for f in self.findings)
        columns = ("what", "status", "found", "how to mend it")
        return (Table(title="This machine", columns=columns, rows=rows),)


def examine() -> Examination:
    """Look at this machine; never raises, whatever is broken on it."""
    gpu, found = _gpu()
    packages = [_package(name, extra) for name, extra in _PACKAGES.items() if name != "torch"]
    findings = [
        _system(),
        gpu,
        _torch(found),
        *packages,
        _triton(found),
        *_onnxruntime(found),
        *(_tensorrt(flavour, found) for flavour in _TENSORRT),
    ]
    return Examination(findings=tuple(findings))


@dataclass(frozen=True, kw_only=True)
class _Cuda:
    """The driver's newest CUDA as (major, minor), and its GPUs; empty without a driver."""

    version: tuple[int, int] = (0, 0)
    gpus: tuple[Gpu, ...] = ()


def _system() -> Finding:
    value = (
        f"kilodelta {kilodelta.__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    )
    return Finding(topic="system", status=OK, value=value)


def _gpu() -> tuple[Finding, _Cuda]:
    try:
        return _gpus(driver())
    except (CudaError, OSError, AttributeError) as error:  # a driver may lack functions
        fix = "needed only to run on a GPU; install NVIDIA's driver there"
        return Finding(topic="gpu", status=MISSING, value=str(error), fix=fix), _Cuda()


def _gpus(cuda: Driver) -> tuple[Finding, _Cuda]:
    found = _Cuda(version=cuda.version(), gpus=cuda.gpus())
    cards = ", ".join(
        f"{gpu.name} ({gpu.sm}, {gpu.memory_bytes / 1e9:.0f} GB)" for gpu in found.gpus
    )
    major, minor = found.version
    value = f"{cards or 'none'}; driver {_driver_release()} for CUDA up to {major}.{minor}"
    return Finding(topic="gpu", status=OK if found.gpus else MISSING, value=value), found


def _driver_release() -> str:
    """The driver's own version by NVML; Jetsons have none."""
    text = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, 96) == 0:
            return text.value.decode("ascii", "replace")
    except (OSError, AttributeError):
        pass
    return "of unknown version"


def _package(name: str, requirement: str) -> Finding:
    found = version(name)
    if found is None:
        return _missing(name, f"pip install '{requirement}'")
    if found == "unknown":
        again = f"pip install --force-reinstall --no-deps {name}"
        return Finding(topic=name, status=BROKEN, value="its metadata is damaged", fix=again)
    return Finding(topic=name, status=OK, value=found)


def _missing(topic: str, fix: str) -> Finding:
    return Finding(topic=topic, status=MISSING, value="not installed", fix=fix)


def _torch(cuda: _Cuda) -> Finding:
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


def _triton(cuda: _Cuda) -> Finding:
    finding = _package("triton", "kilodelta[gpu]")
    if finding.status == MISSING and not cuda.gpus:
        return Finding(topic="triton", status=OK, value="not installed, and no use without a GPU")
    return finding


def _onnxruntime(cuda: _Cuda) -> list[Finding]:
    extra = "gpu" if cuda.gpus else "cpu"
    wheels = distributions("onnxruntime")
    if not wheels:
        return [_missing("onnxruntime", f"pip install 'kilodelta[{extra}]'")]
    listed = ", ".join(f"{wheel} {version(wheel)}" for wheel in wheels)
    if len(wheels) > 1:
        return [_both_wheels(wheels, listed, extra)]
    answer = ask(
        "import onnxruntime as o; print('\\n'.join([o.__version__, *o.get_available_providers()]))"
    )
    return [_one_wheel(wheels[0], listed, answer, cuda)]


def _both_wheels(wheels: tuple[str, ...], listed: str, extra: str) -> Finding:
    """Wheels that overwrite each other's files: removing one breaks the other, so remove all."""
    fix = f"pip uninstall -y {' '.join(wheels)} && pip install 'kilodelta[{extra}]'"
    return Finding(
        topic="onnxruntime",
        status=CONFLICT,
        value=f"{listed}: they cannot live side by side",
        fix=fix,
    )


def _one_wheel(wheel: str, listed: str, answer: Answer, cuda: _Cuda) -> Finding:
    if answer.error:
        fix = f"pip install --force-reinstall --no-deps {wheel}"
        value = f"{listed}: {answer.error}"
        return Finding(topic="onnxruntime", status=BROKEN, value=value, fix=fix)
    providers = [line for line in answer.lines[1:] if line != "AzureExecutionProvider"]
    value = f"{listed}: {', '.join(providers)}"
    if cuda.gpus and "CUDAExecutionProvider" not in providers:
        fix = f"for the GPU: pip uninstall -y {wheel} && pip install 'kilodelta[gpu]'"
        return Finding(topic="onnxruntime", status=CONFLICT, value=value, fix=fix)
    return Finding(topic="onnxruntime", status=OK, value=value)


def _tensorrt(flavour: str, cuda: _Cuda) -> Finding:
    answer = ask(
        f"import importlib.util as u, sys; u.find_spec('{flavour}') or sys.exit(0); "
        f"import {flavour} as t; print(t.__version__)"
    )
    if answer.error:
        fix = f"reinstall it: {_TENSORRT[flavour]}"
        return Finding(topic=flavour, status=BROKEN, value=answer.error, fix=fix)
    if not answer.lines:
        return _missing(flavour, _TENSORRT[flavour])
    reach = "builds and runs engines" if cuda.gpus else "builds engines; running them needs a GPU"
    if flavour == "tensorrt" and not cuda.gpus:
        reach = "needs a GPU to build and to run engines"
    return Finding(topic=flavour, status=OK, value=f"{answer.lines[-1]}, {reach}")
