"""Build engines of one architecture with any weights, as often as a map or a release asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import Template, fill_template
from kilodelta.export.patching.engine.map import Build
from kilodelta.export.tensorrt.build import build
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.safetensors import write_stream
from kilodelta.files.tensor import Bytes, RawTensor


def engine_builder(
    trt: Any,
    template: Template,
    weights: Checkpoint,
    *,
    capabilities: Sequence[str],
) -> Build:
    """Return what builds the engine of a template with some of its weights replaced.

    Args:
        trt: from `kilodelta.export.tensorrt.flavour.choose`.
        template: the architecture.
        weights: holds all weights of the template.
        capabilities: GPUs that the engines are for.

    Returns:
        A function of (replaced tensors by name, a new path); it raises `ExportError` where TensorRT
        refuses the model.
    """

    def built(changed: Mapping[str, RawTensor], out: Path) -> None:
        with staging.scratch(out) as work:
            held, onnx = work / "weights.safetensors", work / "model.onnx"
            infos = [weights.info(name) for name in template.weights]

            def data() -> Iterator[Bytes]:
                for info in infos:
                    own = changed.get(info.name)
                    yield weights.data(info.name) if own is None else own.data

            write_stream(held, infos, (one.data for one in data()))
            save(fill_template(template, held), onnx)
            build(trt, onnx, out, capabilities=capabilities, profile=template.profile())

    return built
