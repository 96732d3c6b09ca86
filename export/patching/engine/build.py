"""Build engines of one architecture with any weights, as often as a map or a release asks for."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.export.onnx.save import save
from kilodelta.export.onnx.template import Template, fill_template
from kilodelta.export.patching.engine.builds import Build
from kilodelta.export.patching.engine.twin import Value
from kilodelta.export.quantised.graph import QDQ, put_codes
from kilodelta.export.tensorrt.build import build
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.safetensors import write_stream
from kilodelta.files.tensor import Bytes, RawTensor
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.model import QuantisedModel


def engine_builder(
    trt: Any,
    template: Template,
    weights: Checkpoint,
    *,
    capabilities: Sequence[str],
    quantised: QuantisedModel | None = None,
    leave: Container[str] = (),
) -> Build:
    """Return what builds the engine of a template with some of its weights replaced.

    Args:
        trt: from `kilodelta.export.tensorrt.flavour.choose`.
        template: the architecture.
        weights: holds all weights of the template; those of a quantised base as any floats.
        capabilities: GPUs that the engines are for.
        quantised: the quantised base, whose codes the engines hold.
        leave: names of its weights that are floats in the engines: heads in their place.

    Returns:
        A function of (replaced weights by name, a new path); it raises `ExportError` where TensorRT
        refuses the model.
    """

    def built(changed: Mapping[str, Value], out: Path) -> None:
        with staging.scratch(out) as work:
            held, onnx = work / "weights.safetensors", work / "model.onnx"
            infos = [weights.info(name) for name in template.weights]

            def data() -> Iterator[Bytes]:
                for info in infos:
                    own = changed.get(info.name)
                    yield own.data if isinstance(own, RawTensor) else weights.data(info.name)

            write_stream(held, infos, (one.data for one in data()))
            model = fill_template(template, held)
            if quantised is not None:
                own = _Recoded(quantised, changed)
                put_codes(model, own, form=QDQ, dtype=template.dtype, leave=leave)
            save(model, onnx)
            build(trt, onnx, out, capabilities=capabilities, profile=template.profile())

    return built


@dataclass(frozen=True)
class _Recoded:
    """A quantised base with some of its codes replaced."""

    base: QuantisedModel
    changed: Mapping[str, Value]

    @property
    def stored(self) -> Mapping[str, object]:
        return self.base.stored

    def matrix(self, name: str) -> Matrix:
        own = self.changed.get(name)
        return own if isinstance(own, Matrix) else self.base.matrix(name)
