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

R = TypeVar("R", bound=Runner)


def is_engine(bundle: Bundle) -> bool:
    """Return whether a bundle runs in TensorRT."""
    return bundle.runtime in FLAVOURS


def file_name(bundle: Bundle) -> str:
    """Return the name of what a bundle runs: an engine or an ONNX file."""
    return ENGINE if is_engine(bundle) else ONNX


def provider(bundle: Bundle) -> str:
    """Return ONNX Runtime's device: "cpu" or "cuda"."""
    return bundle.runtime.removeprefix("onnxruntime-")


def open_runner(bundle: Bundle, folder: Path) -> Runner:
    """Open the model in a folder, ready to compute.

    Args:
        bundle: names the runtime.
        folder: holds `model.onnx` or `model.engine`.

    Raises:
        MissingPackageError: the runtime is not installed.
        ProofError: it cannot run the model here.
    """
    if is_engine(bundle):
        return ready(TensorrtRunner(folder / ENGINE, flavour=bundle.runtime))
    return ready(OnnxRunner(folder / ONNX, device=provider(bundle)))


def ready(runner: R) -> R:
    """Return a runner that is known to work here.

    Raises:
        MissingPackageError, ProofError: why it does not.
    """
    problem = runner.available()
    if problem is not None:
        raise problem
    return runner


def version(bundle: Bundle) -> str:
    """Return the runtime's name and version.

    Raises:
        MissingPackageError: it is not installed.
    """
    if is_engine(bundle):
        package = require(bundle.runtime, extra=EXTRAS[bundle.runtime], why="run engines")
    else:
        extra = "cpu" if provider(bundle) == "cpu" else "gpu"
        package = require("onnxruntime", extra=extra, why="run ONNX models")
    return f"{bundle.runtime} {package.__version__}"
