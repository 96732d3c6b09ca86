"""Write `config.pbtxt`: what Triton Inference Server has to know of an exported model.

Source of the field names: `model_config.proto` of triton-inference-server/common.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from kilodelta.export.manifest.facts import BATCH, Artefact, Port
from kilodelta.files.dtypes import BY_LONG

_BACKENDS = {"onnx": "onnxruntime", "engine": "tensorrt"}
MODEL_FILES = {"onnx": "model.onnx", "engine": "model.plan"}
"""The names that Triton's back ends look for, by the kind of artefact."""


def config(name: str, artefact: Artefact) -> str:
    """Return the text of `config.pbtxt`.

    A model whose inputs and outputs all begin with the batch, and hold it nowhere else, is batched
    by the server, up to the profile's largest batch and preferably in its usual one; any other
    takes requests as they are.

    Args:
        name: the model's name in the repository.
        artefact: what is served.
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
    """Return the batch up to which the server joins requests; 0 where it must not."""
    if not all(map(_is_by_row, (*artefact.inputs, *artefact.outputs))):
        return 0
    return min((shapes[2][0] for shapes in artefact.profile.values()), default=0)


def _is_by_row(port: Port) -> bool:
    """Return whether each row is one request's; scores between rows, as CLIP's, are not."""
    rest = (size for size in port.shape[1:] if isinstance(size, str))
    return port.shape[:1] == (BATCH,) and not any(re.search(rf"\b{BATCH}\b", s) for s in rest)


def _preferred(artefact: Artefact, largest: int) -> list[int]:
    usual = {shapes[1][0] for shapes in artefact.profile.values()}
    return sorted(size for size in usual | {largest} if size > 1)


def _tensors(kind: str, ports: Iterable[Port], *, batched: bool) -> list[str]:
    lines = [f"{kind} ["]
    for port in ports:
        triton = BY_LONG[port.dtype].triton
        lines += ["  {", f"    name: {_text(port.name)}", f"    data_type: {triton}"]
        lines += _dims(port.shape[1:] if batched else port.shape)
        lines += ["  },"]
    return [*lines[:-1], "  }", "]"]


def _dims(shape: tuple[int | str, ...]) -> list[str]:
    """Triton wants at least one dimension: a single number per row is declared by a reshape."""
    sizes = ", ".join(str(size if isinstance(size, int) else -1) for size in shape)
    if not sizes:
        return ["    dims: [ 1 ]", "    reshape: { shape: [ ] }"]
    return [f"    dims: [ {sizes} ]"]


def _text(value: str) -> str:
    """Return a protobuf text literal: JSON's escapes are among its own."""
    return json.dumps(value, ensure_ascii=False)
