"""Parse an ONNX file into a strongly typed TensorRT network, and tell all that is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilodelta.errors import ExportError
from kilodelta.export.manifest.facts import Profile
from kilodelta.export.tensorrt.log import logger


class Network:
    """A parsed ONNX file, with the builder that made it; its precision is what the file says.

    Args:
        trt: the TensorRT module.
        onnx: the file.

    Raises:
        ExportError: TensorRT refuses the file; the message names every node it refuses.
    """

    def __init__(self, trt: Any, onnx: Path) -> None:
        log = logger(trt)
        log.errors.clear()
        self.trt, self.source = trt, onnx
        self.builder = _builder(trt, log)
        typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(typed)
        self.parser = trt.OnnxParser(self.network, log)  # its weights are the network's: keep it
        if not self.parser.parse_from_file(str(onnx)) or not self.network.num_outputs:
            raise _refused(trt, onnx, self.parser)

    def inputs(self) -> tuple[str, ...]:
        """Return the names of the inputs."""
        return tuple(self.network.get_input(i).name for i in range(self.network.num_inputs))

    def profile(self, shapes: Profile) -> Any:
        """Make an optimisation profile.

        Args:
            shapes: for each input its smallest, usual and largest shape.

        Raises:
            ExportError: the network has other inputs.
        """
        if set(shapes) != set(self.inputs()):
            raise ExportError(
                f"{self.source.name} has the inputs {', '.join(self.inputs())}, "
                f"the profile names {', '.join(shapes)}",
                fix="give shapes for exactly these inputs",
            )
        made = self.builder.create_optimization_profile()
        for name, points in shapes.items():
            made.set_shape(name, *points)
        return made

    def mark_refittable(self, names: Sequence[str]) -> None:
        """Mark the weights that a later refit exchanges.

        Raises:
            ExportError: naming those that the network does not have.
        """
        unknown = [name for name in names if not self.network.mark_weights_refittable(name)]
        if unknown:
            raise ExportError(
                f"{self.source.name} has no weights {', '.join(unknown)} that could be refitted",
                fix="give names of the ONNX file's initializers",
            )


def _builder(trt: Any, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except (TypeError, RuntimeError) as error:  # what the bindings make of a null pointer
        said = "; ".join(log.errors) or str(error)
        raise ExportError(
            f"{trt.__name__} {trt.__version__} does not start: {said}",
            fix="see `kilodelta doctor`: the driver may be missing or too old for it",
        ) from None


def _refused(trt: Any, onnx: Path, parser: Any) -> ExportError:
    faults = [_told(parser.get_error(index)) for index in range(parser.num_errors)]
    faults = faults or ["it puts nothing out"]  # an empty file is a valid protobuf message
    listed = "".join(f"\n  {fault}" for fault in faults)
    return ExportError(
        f"{trt.__name__} {trt.__version__} does not take {onnx.name}:{listed}",
        fix="replace what is named in the model's code, or export to ONNX only",
    )


def _told(error: Any) -> str:
    """Describe one of the parser's errors: code, node and operator if there is one, text."""
    node = f" at node {error.node_name()} ({error.node_operator()})" if error.node_name() else ""
    return f"{error.code().name}{node}: {error.desc()}"
