"""A template: the ONNX graph of an architecture, to be filled with the weights of any fine-tune.

In a template every weight the outputs depend on is an initializer with its checkpoint name and
its layout, proved by `kilodelta.export.onnx.proof`. So exporting another fine-tune means copying
tensors by name. `kilodelta.export.onnx.make` makes templates.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kilodelta.errors import CheckpointError, ExportError
from kilodelta.export.manifest.facts import Port, Profile, Shape, Sizes
from kilodelta.files import dtypes
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.models.weights import tensor

_LONG: Mapping[str, str] = MappingProxyType(
    {row.onnx: row.long for row in dtypes.DTYPES.values() if row.onnx}
)
"""ONNX's names of types to numpy's."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """An exported architecture without its weights' values.

    Floating inputs and outputs are in `dtype` as well (`pixel_values` of a float16 template is
    float16); token ids stay int64.

    Attributes:
        model: an `onnx_ir.Model`; leave it as it is.
        dtype: "float32", "float16" or "bfloat16".
        weights: checkpoint name, which is also the initializer's name, to shape.
        unused: checkpoint names of tensors that the outputs do not depend on (an idle pooler).
        inputs, outputs: the graph's.
        opset: of the ONNX standard.
        sizes: smallest, usual and largest size of every axis that varies, by name.
        notes: sentences on what is fixed although one might expect otherwise.
    """

    model: Any
    dtype: str
    weights: Mapping[str, tuple[int, ...]]
    unused: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opset: int
    sizes: Mapping[str, Sizes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def profile(self) -> Profile:
        """Return the smallest, usual and largest shape of every input."""
        return MappingProxyType({port.name: self._shapes(port) for port in self.inputs})

    def _shapes(self, port: Port) -> tuple[Shape, Shape, Shape]:
        def at(point: int) -> Shape:
            return tuple(self.sizes[n][point] if isinstance(n, str) else n for n in port.shape)

        return at(0), at(1), at(2)


def fill_template(template: Template, checkpoint: Checkpoint | str | Path) -> Any:
    """Return the model with a checkpoint's weights, as an `onnx_ir.Model`.

    Tensors are read from the mapped file, and rounded to the template's dtype, only when the
    model is written.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    import onnx_ir as ir

    source = Checkpoint.open(checkpoint)
    _check_fit(template, source)
    model, dtype = template.model.clone(), getattr(torch, template.dtype)
    for name in template.weights:
        value = model.graph.initializers[name]
        read = functools.partial(_rounded, source, name, dtype)
        value.const_value = ir.LazyTensor(read, value.dtype, value.shape, name=name)
    return model


def port(value: Any) -> Port:
    """Describe an input or output of an `onnx_ir` graph; the shape is () where it states none."""
    sizes = () if value.shape is None else value.shape
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in sizes)
    return Port(name=value.name, dtype=_LONG[value.dtype.name], shape=shape)


def _check_fit(template: Template, source: Checkpoint) -> None:
    for name, shape in template.weights.items():
        found = source.info(name).shape
        if found != shape:
            raise CheckpointError(
                f"{source.path}: tensor {name} has shape {found}, the template's has {shape}",
                fix="export a template of this checkpoint's own architecture",
            )


def _rounded(source: Checkpoint, name: str, dtype: torch.dtype) -> Any:
    """Make one weight an `onnx_ir` tensor, to nearest even where it has to be rounded.

    Raises:
        ExportError: a finite value does not fit into the dtype.
    """
    from onnx_ir import tensor_adapters

    values = tensor(source, name)
    rounded = values.to(dtype) if values.is_floating_point() else values
    if rounded.isinf().sum() != values.isinf().sum():
        raise ExportError(
            f"{name} holds values up to {values.abs().max():.6g}, beyond {dtype}",
            fix="export in bfloat16 or float32",
        )
    return tensor_adapters.TorchTensor(rounded, name=name)
