"""Named ONNX export: one template of an architecture, filled with the weights of any fine-tune.

In a template every weight the outputs depend on is an initializer with its checkpoint name and
its layout, proved by `kilodelta.export.onnx.proof`. So exporting another fine-tune means copying
tensors by name.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from kilodelta.errors import CheckpointError, ExportError, InputError
from kilodelta.export.manifest.facts import Port
from kilodelta.export.onnx.clean import clean, rename
from kilodelta.export.onnx.proof import claim, make_twin, require_kept
from kilodelta.export.onnx.trace import trace
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.tying import first_names
from kilodelta.models import Batch, LoadedModel, View, example
from kilodelta.models.example_inputs import axes
from kilodelta.models.weights import tensor

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
)
"""The precisions to export in."""

_PLAIN: Mapping[str, str] = MappingProxyType({"FLOAT": "float32", "DOUBLE": "float64"})
"""ONNX's names of dtypes, where they are not the usual ones in capitals."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """An exported architecture without its weights' values.

    Floating inputs and outputs are in `dtype` too (`pixel_values` of a float16 template is
    float16); token ids stay int64.
    """

    model: Any
    """An `onnx_ir.Model`; leave it as it is."""

    dtype: str
    """`float32`, `float16` or `bfloat16`."""

    weights: Mapping[str, tuple[int, ...]]
    """Checkpoint name, which is the initializer's name too, to shape."""

    unused: tuple[str, ...]
    """Checkpoint names of tensors that the outputs do not depend on (an idle pooler)."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opset: int


def export_template(
    loaded: LoadedModel, batch: Batch | None = None, *, dtype: str = "float32"
) -> Template:
    """Export a model's architecture; its weights' values play no part.

    Args:
        loaded: what to export.
        batch: inputs the model takes. Only their names, dtypes and fixed sizes matter; token
            models and images of a known size need none.
        dtype: the precision of weights and arithmetic. Casts that the model itself makes stay:
            most normalise and take softmax in float32.

    Raises:
        ExportError: torch cannot export it, or a weight does not stay itself.
        InputError: an unknown dtype, or no batch where one is needed.
        MissingPackageError: onnxscript is not installed.
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype} is no precision to export in", fix=f"give {', '.join(DTYPES)}")
    twin = make_twin(loaded.module, DTYPES[dtype])
    shown = _in_dtype(batch or example(loaded), DTYPES[dtype])
    view = View(twin, loaded.pooling, loaded.chosen)
    raw = trace(view, shown, {name: axes(loaded, name, t) for name, t in shown.items()})
    claimed = claim(raw, twin)
    clean(raw.model)
    require_kept(raw.model, claimed, claimed.keys() & raw.used)
    named = _by_checkpoint_name(loaded, twin, claimed)
    rename(raw.model, named)
    return _template(raw.model, dtype, loaded, named)


def fill_template(template: Template, checkpoint: Checkpoint | str | Path) -> Any:
    """The model with a checkpoint's weights, as an `onnx_ir.Model`.

    Tensors are read from the mapped file, and rounded to the template's dtype, only when the
    model is written.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    import onnx_ir as ir

    source = Checkpoint.open(checkpoint)
    _check_fit(template, source)
    model = template.model.clone()
    for name in template.weights:
        value = model.graph.initializers[name]
        read = functools.partial(_rounded, source, name, DTYPES[template.dtype])
        value.const_value = ir.LazyTensor(read, value.dtype, value.shape, name=name)
    return model


def _in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()}


def _by_checkpoint_name(
    loaded: LoadedModel, twin: nn.Module, claimed: Mapping[str, list[Any]]
) -> dict[str, list[Any]]:
    """The claimed values by checkpoint name, in name order."""
    firsts = first_names(twin.state_dict())
    owner = {firsts[place]: name for name, place in loaded.names.items()}
    orphans = sorted(set(claimed) - set(owner))
    if orphans:
        raise ExportError(
            f"no checkpoint holds {', '.join(orphans)}, which the outputs depend on",
            fix="give the merged model, or a delta that carries them as extras",
        )
    found = {owner[name]: values for name, values in claimed.items()}
    return {name: found[name] for name in in_name_order(found)}


def _template(
    model: Any, dtype: str, loaded: LoadedModel, named: Mapping[str, list[Any]]
) -> Template:
    there = model.graph.initializers
    weights = {name: tuple(there[name].shape.numpy()) for name in named if name in there}
    return Template(
        model=model,
        dtype=dtype,
        weights=MappingProxyType(weights),
        unused=tuple(name for name in loaded.names if name not in weights) + loaded.unused,
        inputs=tuple(map(port, model.graph.inputs)),
        outputs=tuple(map(port, model.graph.outputs)),
        opset=model.opset_imports[""],
    )


def port(value: Any) -> Port:
    """Describe an input or output of an `onnx_ir` graph; one that states no shape has none here."""
    sizes = () if value.shape is None else value.shape
    shape = tuple(size if isinstance(size, int) else str(size.value) for size in sizes)
    name = value.dtype.name
    return Port(name=value.name, dtype=_PLAIN.get(name, name.lower()), shape=shape)


def _check_fit(template: Template, source: Checkpoint) -> None:
    for name, shape in template.weights.items():
        found = source.info(name).shape
        if found != shape:
            raise CheckpointError(
                f"{source.path}: tensor {name} has shape {found}, the template's has {shape}",
                fix="export a template of this checkpoint's own architecture",
            )


def _rounded(source: Checkpoint, name: str, dtype: torch.dtype) -> Any:
    """One weight as an `onnx_ir` tensor, to nearest even where it has to be rounded.

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
