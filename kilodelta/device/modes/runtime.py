"""The runtime that a bundle names, opened on one of its files."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from kilodelta.device.folder.bundle import Bundle
from kilodelta.errors import require
from kilodelta.export.manifest.facts import FLAVOURS
from kilodelta.export.tensorrt.flavour import EXTRAS
from kilodelta.verify.runners.onnx_runner import OnnxRunner
from kilodelta.verify.runners.runner import Runner
from kilodelta.verify.runners.tensorrt_runner import TensorrtRunner

ONNX, ENGINE = "model.onnx", "model.engine"


def is_engine(bundle: Bundle) -> bool:
    """Whether a bundle runs in TensorRT."""
    return bundle.runtime in FLAVOURS


def model_name(bundle: Bundle) -> str:
    """The file that is run."""
    return ENGINE if is_engine(bundle) else ONNX


def provider(bundle: Bundle) -> str:
    """ONNX Runtime's device: "cpu" or "cuda"."""
    return bundle.runtime.removeprefix("onnxruntime-")


def open_runner(bundle: Bundle, folder: Path) -> Runner:
    """The model in a folder, ready to compute.

    Raises:
        MissingPackageError: the runtime is not installed.
        ProofError: it cannot run here.
    """
    path = folder / model_name(bundle)
    if is_engine(bundle):
        return ready(TensorrtRunner(path, flavour=bundle.runtime))
    return ready(OnnxRunner(path, device=provider(bundle)))


R = TypeVar("R", bound=Runner)


def ready(runner: R) -> R:
    """A runner that is known to work here."""
    problem = runner.available()
    if problem is not None:
        raise problem
    return runner


def version(bundle: Bundle) -> str:
    """The runtime's name and version.

    Raises:
        MissingPackageError: it is not installed.
    """
    if is_engine(bundle):
        package = require(bundle.runtime, extra=EXTRAS[bundle.runtime], why="run engines")
        return f"{bundle.runtime} {package.__version__}"
    extra = "cpu" if provider(bundle) == "cpu" else "gpu"
    package = require("onnxruntime", extra=extra, why="run ONNX models")
    return f"{bundle.runtime} {package.__version__}"
