"""Ask ONNX Runtime and TensorRT what they can do, each in a separate process."""

from __future__ import annotations

from dataclasses import dataclass

from kilodelta.export.tensorrt.cuda import Gpu
from kilodelta.verify.environment.packages import Answer, ask, distributions, version

OK, MISSING, BROKEN, CONFLICT = "ok", "missing", "broken", "conflict"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing on this machine.

    Attributes:
        topic: what it is, such as "onnxruntime".
        status: `OK`, `MISSING`, `BROKEN` or `CONFLICT`.
        value: its version and what it can do, or what is wrong.
        fix: what to do about it; empty if nothing.
    """

    topic: str
    status: str
    value: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """The driver's newest CUDA as (major, minor), and its GPUs; empty without a driver."""

    version: tuple[int, int] = (0, 0)
    gpus: tuple[Gpu, ...] = ()


def missing(topic: str, fix: str) -> Finding:
    """Return the finding about something that is not installed."""
    return Finding(topic=topic, status=MISSING, value="not installed", fix=fix)


def install(extra: str) -> str:
    """Return the command that installs an extra of `pyproject.toml`; the package is on no index.

    Example:
        >>> install("hf")
        "in a clone of kilodelta: pip install '.[hf]'"
    """
    return f"in a clone of kilodelta: {_pip(extra)}"


def _pip(extra: str) -> str:
    return f"pip install '.[{extra}]'" if extra else "pip install ."


TENSORRT = {
    "tensorrt": f"NVIDIA's JetPack, container or apt packages; {install('tensorrt')}",
    "tensorrt_rtx": install("rtx"),
}
"""By flavour, where it comes from."""

_PROVIDERS = (
    "import onnxruntime as o; print('\\n'.join([o.__version__, *o.get_available_providers()]))"
)

# The model is y = -x, in 60 bytes. ONNX Runtime says on stderr what it misses.
_ON_CUDA = """
import base64, onnxruntime
model = base64.b64decode(
    "CAg6MgoLCgF4EgF5IgNOZWcSAWdaDwoBeBIKCggIARIECgIIAWIPCgF5EgoKCAgBEgQKAggBQgQKABAN"
)
getattr(onnxruntime, "preload_dlls", lambda: None)()
wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
session = onnxruntime.InferenceSession(model, providers=wanted)
raise SystemExit(int(session.get_providers()[0] != wanted[0]))
"""

_TENSORRT = """
import importlib.util, sys
importlib.util.find_spec("{0}") or sys.exit(0)
import {0}
print({0}.__version__)
known = getattr({0}, "ComputeCapability", None)
print(*(name.lower() for name in getattr(known, "__members__", ()) if name[2:].isdecimal()))
"""


def onnxruntime(cuda: Cuda) -> Finding:
    """Look at the wheel, its providers, and whether CUDA loads if there is a GPU."""
    extra = "gpu" if cuda.gpus else "cpu"
    wheels = distributions("onnxruntime")
    if not wheels:
        return missing("onnxruntime", install(extra))
    listed = ", ".join(f"{wheel} {version(wheel)}" for wheel in wheels)
    if len(wheels) > 1:
        return _both_wheels(wheels, listed, extra)
    return _one_wheel(wheels[0], listed, ask(_PROVIDERS), cuda)


def _both_wheels(wheels: tuple[str, ...], listed: str, extra: str) -> Finding:
    # They overwrite each other's files: removing one breaks the other, so remove all of them.
    fix = f"in a clone of kilodelta: pip uninstall -y {' '.join(wheels)} && {_pip(extra)}"
    return Finding(
        topic="onnxruntime",
        status=CONFLICT,
        value=f"{listed}: they cannot live side by side",
        fix=fix,
    )


def _one_wheel(wheel: str, listed: str, answer: Answer, cuda: Cuda) -> Finding:
    if answer.error:
        fix = f"pip install --force-reinstall --no-deps {wheel}"
        value = f"{listed}: {answer.error}"
        return Finding(topic="onnxruntime", status=BROKEN, value=value, fix=fix)
    providers = [line for line in answer.lines[1:] if line != "AzureExecutionProvider"]
    value = f"{listed}: {', '.join(providers)}"
    if not cuda.gpus:
        return Finding(topic="onnxruntime", status=OK, value=value)
    return _on_gpu(wheel, value, has_cuda="CUDAExecutionProvider" in providers)


def _on_gpu(wheel: str, value: str, *, has_cuda: bool) -> Finding:
    if not has_cuda:
        fix = f"in a clone of kilodelta: pip uninstall -y {wheel} && {_pip('gpu')}"
        return Finding(topic="onnxruntime", status=CONFLICT, value=value, fix=fix)
    problem = ask(_ON_CUDA).error
    if problem:
        return Finding(
            topic="onnxruntime",
            status=BROKEN,
            value=f"{value}, but CUDA does not load: {problem}",
            fix="pip install 'onnxruntime-gpu[cuda,cudnn]'",
        )
    return Finding(topic="onnxruntime", status=OK, value=f"{value}; CUDA loads")


def tensorrt(flavour: str, cuda: Cuda) -> Finding:
    """Look at one flavour of TensorRT: its version, and for which GPUs it builds."""
    answer = ask(_TENSORRT.format(flavour))
    if answer.error:
        fix = f"reinstall it: {TENSORRT[flavour]}"
        return Finding(topic=flavour, status=BROKEN, value=answer.error, fix=fix)
    if not answer.lines:
        return missing(flavour, TENSORRT[flavour])
    installed, names = answer.lines[0], answer.lines[-1].split()
    if flavour == "tensorrt":
        reach = "builds and runs engines" if cuda.gpus else "needs a GPU to build and run engines"
        return Finding(topic=flavour, status=OK, value=f"{installed}, {reach}")
    return _rtx(installed, names, cuda)


def _rtx(installed: str, names: list[str], cuda: Cuda) -> Finding:
    """RTX builds anywhere for the GPUs that it knows; this machine's may not be among them."""
    value = f"{installed}, builds engines for {', '.join(names)}"
    strange = [gpu.sm for gpu in cuda.gpus if gpu.sm not in names]
    if strange:
        value += f", not for this machine's {', '.join(strange)}"
        fix = f"for {strange[0]} use tensorrt: {TENSORRT['tensorrt']}"
        return Finding(topic="tensorrt_rtx", status=OK, value=value, fix=fix)
    reach = "runs them here" if cuda.gpus else "running them needs a GPU"
    return Finding(topic="tensorrt_rtx", status=OK, value=f"{value}; {reach}")
