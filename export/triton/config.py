"""`config.pbtxt`: what Triton Inference Server has to know of an exported model.

Source of the field names: `model_config.proto` of triton-inference-server/common.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from kilodelta.export.manifest.facts import Artefact, Port
from kilodelta.files.dtypes import BY_LONG

_BACKENDS = {"onnx": "onnxruntime", "engine": "tensorrt"}
BATCH = "batch"
"""The axis that an export's inputs and outputs share."""
MODEL_FILES = {"onnx": "model.onnx", "engine": "model.plan"}
"""The names that Triton's back ends look for, by the kind of artefact."""


def config(name: str, artefact: Artefact) -> str:
    """Write the text of `config.pbtxt`.

    A model whose inputs and outputs all begin with the batch is batched by the server, up to the
    profile's largest batch and preferably in its usual one; any other takes requests as they are.

    Args:
        name: of the model in the repository.
        artefact: the ONNX file or engine that it serves.
    """
    largest = _largest_batch(artefact)
    lines = [
        f"name: {_text(name)}",
        f"backend: {_text(_BACKENDS[artefact.kind])}",
        f"max_batch_size: {largest}",
        *_tensors("input", artefact.inputs, batched=largest > 0),
        *_tensors("output", artefact.outputs, batched=largest > 0),
    ]
    if largest > 1:
        sizes = ", ".join(map(str, _preferred(artefact, largest)))
        lines += ["dynamic_batching {", f"  preferred_batch_size: [ {sizes} ]", "}"]
    if artefact.kind == "engine":
        lines += ["instance_group [", "  { kind: KIND_GPU }", "]"]
    return "\n".join(lines) + "\n"


def _largest_batch(artefact: Artefact) -> int:
    """0 where the server must not batch."""
    ports = (*artefact.inputs, *artefact.outputs)
    if any(not port.shape or port.shape[0] != BATCH for port in ports):
        return 0
    return min((shapes[2][0] for shapes in artefact.profile.values()), default=0)


def _preferred(artefact: Artefact, largest: int) -> list[int]:
    usual = {shapes[1][0] for shapes in artefact.profile.values()}
    return sorted(size for size in usual | {largest} if size > 1)


def _tensors(kind: str, ports: Iterable[Port], *, batched: bool) -> list[str]:
    lines = [f"{kind} ["]
    for port in ports:
        lines += [
            "  {",
            f"    name: {_text(port.name)}",
            f"    data_type: {BY_LONG[port.dtype].triton}",
        ]
        lines += _dims(port.shape[1:] if batched else port.shape)
        lines += ["  },"]
    return [*lines[:-1], "  }", "]"]


def _dims(shape: tuple[int | str, ...]) -> list[str]:
    """Triton wants at least one dimension: one number a row goes by a reshape."""
    sizes = ", ".join(str(size if isinstance(size, int) else -1) for size in shape)
    if not sizes:
        return ["    dims: [ 1 ]", "    reshape: { shape: [ ] }"]
    return [f"    dims: [ {sizes} ]"]


def _text(value: str) -> str:
    """Return a protobuf text literal: JSON's escapes are among its own."""
    return json.dumps(value, ensure_ascii=False)
