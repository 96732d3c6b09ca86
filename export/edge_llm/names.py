"""Name a decoder's matrices as the LoRA inputs of a TensorRT Edge-LLM engine, or refuse them.

Source: the LoRA page of TensorRT Edge-LLM's documentation, 0.8.0 to 0.11.1, and the tools that it
names: `insert-lora` gives every linear layer of the exported graph two float16 inputs,
`MODULE.lora_A.weight` (in, rank) and `MODULE.lora_B.weight` (rank, out), where MODULE is the
layer's path in the checkpoint and begins with `model.`; the output layer gets none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError, ExportError, require
from kilodelta.export.peft.modules import ModuleKind, ModuleNaming
from kilodelta.files.checkpoint import Checkpoint, read_config
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target
from kilodelta.models.layer_names import is_of_experts

ROOT = "model"
_IN_A_LAYER = re.compile(rf"({ROOT}\.)?layers\.\d+\..+\.weight")
_FIX = "leave it out: kilodelta compress --exclude; or kilodelta merge, and export the merged model"
_FLOAT16 = 10  # TensorProto.FLOAT16

Shape = tuple[int, int]


def engine_naming(checkpoint: Checkpoint) -> ModuleNaming:
    """Return how a base's modules are called in an engine: as in its files, under `model.`."""
    bare = not any(name.startswith(f"{ROOT}.") for name in checkpoint.names)
    return ModuleNaming(prefix=ROOT if bare else "", config=read_config(checkpoint))


def check_places(delta: Delta, names: ModuleNaming) -> None:
    """Refuse what an engine has no LoRA input for.

    Args:
        delta: bound to its base.
        names: of the base's modules.

    Raises:
        ExportError: a target is no linear layer of the decoder's own, or a tensor is stored whole.
    """
    if delta.extras:
        raise _refused(next(iter(delta.extras)), "is stored whole, and a LoRA side-car holds pairs")
    for name, target in delta.targets.items():
        _check_place(name, target, names)


def _check_place(name: str, target: Target, names: ModuleNaming) -> None:
    if is_of_experts(name):
        raise _refused(name, "belongs to an expert, and engines compute experts without a LoRA")
    if not _IN_A_LAYER.fullmatch(name):
        raise _refused(name, "is no matrix of a decoder layer (model.layers.N...)")
    if names.kind(target) is not ModuleKind.LINEAR:
        raise _refused(name, "is not the weight of a Linear layer")


def _refused(name: str, why: str) -> ExportError:
    return ExportError(
        f"{name} has no place in a TensorRT Edge-LLM adapter: it {why}",
        fix=_FIX,
    )


def read_lora_inputs(path: Path) -> dict[str, Shape]:
    """Read which modules of a `lora_model.onnx` take a LoRA, with the (in, out) of each.

    Args:
        path: the graph; its weights are not read.

    Raises:
        CheckpointError: it is no ONNX file, or has no such inputs.
        MissingPackageError: `onnx` is not installed.
    """
    onnx: Any = require("onnx", extra="onnx", why=f"read {path}")
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as problem:
        raise CheckpointError(
            f"{path} is not an ONNX file: {problem}", fix="give TensorRT Edge-LLM's lora_model.onnx"
        ) from None
    sides: dict[str, dict[str, int]] = {"A": {}, "B": {}}
    for port in graph.input:
        stem, _, side = port.name.removesuffix(".weight").rpartition(".lora_")
        tensor = port.type.tensor_type
        if side in sides and len(tensor.shape.dim) == 2 and tensor.elem_type == _FLOAT16:
            sides[side][stem] = tensor.shape.dim[0 if side == "A" else 1].dim_value
    if not sides["A"] or sides["A"].keys() != sides["B"].keys():
        raise CheckpointError(
            f"{path} has no pairs of float16 inputs MODULE.lora_A.weight and MODULE.lora_B.weight",
            fix="give the lora_model.onnx that trtedge insert-lora writes",
        )
    return {stem: (inputs, sides["B"][stem]) for stem, inputs in sides["A"].items()}


def check_inputs(delta: Delta, modules: Mapping[str, str], graph: Path) -> None:
    """See that a graph takes every pair of a delta, in its shape.

    Args:
        delta: bound to its base.
        modules: the targets' modules as engines name them.
        graph: `lora_model.onnx`.

    Raises:
        ExportError: it has no inputs for a target, or of another shape.
    """
    taken = read_lora_inputs(graph)
    for name, module in modules.items():
        out, in_ = delta.targets[name].matrix
        if module not in taken:
            raise ExportError(
                f"{graph} has no LoRA inputs for {module}, and the runtime would pass over it;"
                f" it has some for {', '.join(sorted(taken)[:4])}, ...",
                fix=_FIX,
            )
        if taken[module] != (in_, out):
            raise ExportError(
                f"{module} is {taken[module][0]} by {taken[module][1]} in {graph},"
                f" and {in_} by {out} in the base",
                fix="give the graph that was exported from this base",
            )
