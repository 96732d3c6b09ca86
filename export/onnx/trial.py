"""Run an exported graph in ONNX Runtime at other sizes than it was traced at.

torch's exporter may freeze a size, or take a branch for it, and still declare the axis free
(a GRU's length, a chunk of a state-space model). So before an export is called done its graph runs
at the sizes traced, at the smallest and at the largest, and its float32 outputs are held against
the module's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilodelta.errors import ExportError, one_line
from kilodelta.export.manifest.facts import BATCH
from kilodelta.export.onnx.axes import AxisGroup, Variation
from kilodelta.models import Batch, LoadedModel
from kilodelta.models.inputs.chance import repeatable_outputs
from kilodelta.models.quiet import quiet

OFF = 1e-2
"""Relative L2 error from which an output counts as wrong. What rounding does lies far below, what
a frozen size does far above; `kilodelta verify` judges with derived limits."""


class GraphTrial:
    """A graph without weights' values, ready to run with those of a module in memory.

    Args:
        model: an `onnx_ir.Model` whose weights bear checkpoint names.
        loaded: the module, whose weights are used.
        weights: the checkpoint names of the graph's weights.
        variation: the batch that was shown, and the axes that vary.
        dtype: of the graph's weights and floats.
    """

    def __init__(
        self,
        model: Any,
        loaded: LoadedModel,
        weights: Mapping[str, tuple[int, ...]],
        variation: Variation,
        dtype: torch.dtype,
    ) -> None:
        self._loaded, self._variation, self._dtype = loaded, variation, dtype
        self._outputs = [value.name for value in model.graph.outputs]
        self._session = open_graph(model, loaded, weights, dtype)

    def guilty(self) -> dict[str, str]:
        """Find the axes, by name, that the graph does not compute at other sizes; say why.

        Raises:
            ExportError: it does not even run, or is wrong, at the sizes it was traced at.
            InputError: the module itself computes something else each time.
        """
        groups = self._variation.groups
        traced = {group.name: group.traced for group in groups}
        if problem := self._problem(traced):
            with torch.no_grad(), quiet():
                repeatable_outputs(self._loaded, self._variation.resized(traced))
            raise ExportError(
                f"the exported graph does not compute {type(self._loaded.module).__name__}: "
                f"{problem}",
                fix="rewrite the layer that is wrong, or export with the versions in "
                "constraints.txt",
            )
        if not any(self._problem(sizes) for sizes in self._sizes()):
            return {}
        alone = dict(self._alone(traced))
        others = [g.name for g in groups if g.name != BATCH] or [BATCH]
        return alone or dict.fromkeys(others, "only some combinations of sizes compute")

    def _sizes(self) -> Iterator[Mapping[str, int]]:
        """Return everything small, for two rows; and everything large, for few rows."""
        groups = self._variation.groups
        low = {g.name: g.sizes[0] for g in groups}
        yield {**low, BATCH: max(2, low[BATCH])} if BATCH in low else low
        yield {g.name: g.sizes[0] if g.name == BATCH else g.sizes[2] for g in groups}

    def _alone(self, traced: Mapping[str, int]) -> Iterator[tuple[str, str]]:
        for group in self._variation.groups:
            for size in _other_sizes(group):
                if problem := self._problem({**traced, group.name: size}):
                    yield group.name, f"at {group.name} {size} {problem}"
                    break

    def _problem(self, sizes: Mapping[str, int]) -> str:
        """Explain what is wrong with the graph at these sizes; empty where nothing is."""
        batch = self._variation.resized(sizes)
        with torch.no_grad(), quiet():
            expected = self._loaded.view()(**batch)
        try:
            results = self._session.run(self._outputs, self._feeds(batch))
        except Exception as error:  # ONNX Runtime's own classes share no other base
            return f"ONNX Runtime stops: {one_line(error)}"
        for name, array in zip(self._outputs, results, strict=True):
            if problem := self._difference(name, array, expected[name]):
                return problem
        return ""

    def _feeds(self, batch: Batch) -> dict[str, Any]:
        return {
            name: (t.to(self._dtype) if t.is_floating_point() else t).numpy()
            for name, t in batch.items()
        }

    def _difference(self, name: str, actual: Any, expected: Tensor) -> str:
        if actual.shape != tuple(expected.shape):
            return f"{name} has shape {actual.shape}, the module's {tuple(expected.shape)}"
        # Rounding decides an argmax between equals, and half precision may overflow: not here.
        if self._dtype != torch.float32 or not expected.is_floating_point():
            return ""
        wanted = expected.detach().double().numpy()  # an output may be a parameter itself
        if not np.isfinite(wanted).all():
            return ""
        norm = np.linalg.norm(wanted)
        error = np.linalg.norm(actual.astype(np.float64) - wanted) / (norm or 1.0)
        return "" if error <= OFF else f"{name} is off by {error:.2g}, relative"


def open_graph(
    model: Any, loaded: LoadedModel, weights: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Any:
    """Open a graph without weights' values in ONNX Runtime, with those of a module in memory.

    Args:
        model: an `onnx_ir.Model` whose weights bear checkpoint names.
        loaded: the module, whose weights are used.
        weights: the checkpoint names of the graph's weights, and their shapes.
        dtype: of the graph's weights and floats.

    Returns:
        an `onnxruntime.InferenceSession`.

    Raises:
        ExportError: ONNX Runtime does not load the graph.
    """
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # what fails is raised as well
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    held = dict(_values(onnxruntime, loaded, weights, dtype))
    if held:
        settings.add_external_initializers(list(held), list(held.values()))
    try:
        return onnxruntime.InferenceSession(
            _without_values(model, weights, dtype), settings, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime does not load the exported graph: {one_line(error)}",
            fix="rewrite the layer that it names, or export with the versions in constraints.txt",
        ) from error


def _values(
    onnxruntime: Any,
    loaded: LoadedModel,
    weights: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> Iterator[tuple[str, Any]]:
    state = loaded.module.state_dict()
    for name in weights:
        tensor = state[loaded.names[name]]
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        yield name, onnxruntime.OrtValue.ortvalue_from_numpy(tensor.contiguous().numpy())


def can_try(dtype: str) -> bool:
    """Return whether graphs of a precision run here: ONNX Runtime is installed and computes in it.

    Its CPU kernels know no bfloat16.
    """
    return dtype != "bfloat16" and importlib.util.find_spec("onnxruntime") is not None


def _without_values(
    model: Any, weights: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> bytes:
    """Return the model as protobuf bytes that refer to weights which the session is given."""
    import onnx_ir as ir

    bare = model.clone()
    for name, shape in weights.items():
        value = bare.graph.initializers[name]
        nbytes = value.dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        value.const_value = ir.ExternalTensor(
            "weights", 0, nbytes, value.dtype, shape=ir.Shape(shape), name=name
        )
    data: bytes = ir.to_proto(bare).SerializeToString()
    return data


def _other_sizes(group: AxisGroup) -> tuple[int, ...]:
    low, _, high = group.sizes
    wanted = (max(low, 2), low) if group.name == BATCH else (low, high)
    return tuple(dict.fromkeys(n for n in wanted if n != group.traced))
