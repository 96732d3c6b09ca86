"""What the doctor says about ONNX Runtime and TensorRT, each asked in a process of its own."""

from __future__ import annotations

from kilodelta.verify.environment.finding import BROKEN, CONFLICT, OK, Cuda, Finding, missing
from kilodelta.verify.environment.packages import Answer, ask, distributions, version

TENSORRT = {
    "tensorrt": "NVIDIA's JetPack, container or apt packages; pip install 'kilodelta[tensorrt]'",
    "tensorrt_rtx": "pip install 'kilodelta[rtx]'",
}
"""Both flavours, and where each comes from."""

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
    """The wheel, its providers, and whether CUDA loads where there is a GPU."""
    extra = "gpu" if cuda.gpus else "cpu"
    wheels = distributions("onnxruntime")
    if not wheels:
        return missing("onnxruntime", f"pip install 'kilodelta[{extra}]'")
    listed = ", ".join(f"{wheel} {version(wheel)}" for wheel in wheels)
    if len(wheels) > 1:
        return _both_wheels(wheels, listed, extra)
    return _one_wheel(wheels[0], listed, ask(_PROVIDERS), cuda)


def _both_wheels(wheels: tuple[str, ...], listed: str, extra: str) -> Finding:
    """Wheels that overwrite each other's files: removing one breaks the other, so remove all."""
    fix = f"pip uninstall -y {' '.join(wheels)} && pip install 'kilodelta[{extra}]'"
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
        fix = f"for the GPU: pip uninstall -y {wheel} && pip install 'kilodelta[gpu]'"
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
    """One flavour: its version, and for which GPUs it builds."""
    answer = ask(_TENSORRT.format(flavour))
    if answer.error:
        fix = f"reinstall it: {TENSORRT[flavour]}"
        return Finding(topic=flavour, status=BROKEN, value=answer.error, fix=fix)
    if not answer.lines:
        return missing(flavour, TENSORRT[flavour])
    found, names = answer.lines[0], answer.lines[-1].split()
    if flavour == "tensorrt":
        reach = "builds and runs engines" if cuda.gpus else "needs a GPU to build and run engines"
        return Finding(topic=flavour, status=OK, value=f"{found}, {reach}")
    return _rtx(found, names, cuda)


def _rtx(found: str, names: list[str], cuda: Cuda) -> Finding:
    """RTX builds anywhere, for the GPUs it knows; this machine's may not be among them."""
    value = f"{found}, builds engines for {', '.join(names)}"
    strange = [gpu.sm for gpu in cuda.gpus if gpu.sm not in names]
    if strange:
        value += f", not for this machine's {', '.join(strange)}"
        fix = f"for {strange[0]} use tensorrt: {TENSORRT['tensorrt']}"
        return Finding(topic="tensorrt_rtx", status=OK, value=value, fix=fix)
    reach = "runs them here" if cuda.gpus else "running them needs a GPU"
    return Finding(topic="tensorrt_rtx", status=OK, value=f"{value}; {reach}")
