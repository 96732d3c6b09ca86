"""Build TensorRT engines, by one module for `tensorrt` and `tensorrt_rtx`.

Networks are strongly typed: the precision is the ONNX file's. TF32 is off unless asked for, so
that float32 means float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilodelta.errors import ExportError
from kilodelta.export.manifest.facts import Profile
from kilodelta.export.tensorrt import cuda
from kilodelta.export.tensorrt.flavour import RTX
from kilodelta.export.tensorrt.log import clean_stdout, logger
from kilodelta.export.tensorrt.network import Network
from kilodelta.export.tensorrt.watch import BuildWatch, attended, monitor
from kilodelta.files import staging
from kilodelta.progress import Progress, silent


def build(
    trt: Any,
    onnx: Path,
    engine: Path,
    *,
    capabilities: Sequence[str],
    profile: Profile,
    tf32: bool = False,
    refit: Sequence[str] = (),
    progress: Progress = silent,
) -> int:
    """Build an engine from an ONNX file and write it, in full or not at all.

    Args:
        trt: what `flavour.choose` returned for these capabilities.
        onnx: the ONNX file.
        engine: the file to write.
        capabilities: GPUs that the engine is for; one engine serves all of them.
        profile: for each input its smallest, usual and largest shape.
        tf32: let float32 products be taken in TF32, faster and with 10 bits of mantissa.
        refit: names of weights that a later refit exchanges.
        progress: called after each phase; what it raises ends the build.

    Returns:
        The number of the engine's bytes.

    Raises:
        ExportError: TensorRT refuses the model; the message holds all that it said.
        OutputError: the engine cannot be written.
    """
    if refit and trt.__name__ == RTX and cuda.present() is None:
        raise ExportError(
            "tensorrt_rtx builds refittable engines only where a GPU and its driver are",
            fix="build on such a machine, or build an engine that is not refittable",
        )
    network = Network(trt, onnx)
    config = _config(network, capabilities, profile, tf32=tf32)
    if refit:
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        network.mark_refittable(refit)
    plan = _run(network, config, progress)
    staging.write(engine, memoryview(plan))
    return int(plan.nbytes)


def _config(network: Network, capabilities: Sequence[str], profile: Profile, *, tf32: bool) -> Any:
    trt = network.trt
    config = network.builder.create_builder_config()
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if config.add_optimization_profile(network.profile(profile)) < 0:
        raise _failed(network, "refuses the profile for", "give shapes that rise and fit the model")
    if trt.__name__ == RTX:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    return config


def _run(network: Network, config: Any, progress: Progress) -> Any:
    watch = BuildWatch(progress)
    config.progress_monitor = monitor(network.trt, watch)
    build = network.builder.build_serialized_network
    with clean_stdout():
        plan = attended(lambda: build(network.network, config), watch)
    if plan is None:
        fix = "see what TensorRT says; another precision or fewer GPUs may be possible"
        raise _failed(network, "builds no engine from", fix)
    return plan


def _failed(network: Network, what: str, fix: str) -> ExportError:
    trt = network.trt
    said = "".join(f"\n  {line}" for line in logger(trt).errors) or " it says nothing"
    return ExportError(
        f"{trt.__name__} {trt.__version__} {what} {network.source.name}:{said}", fix=fix
    )
