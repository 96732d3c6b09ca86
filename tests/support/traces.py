"""Traces of equal modules, computed once in a run of the tests and shared by its workers.

Torch takes seconds to trace the smallest model, and most tests of exports trace one of the same
few. What is traced is a twin whose values follow from names and shapes (`export.onnx.proof`), so
a trace is a function of the module's structure, its configuration and the inputs' sizes: those,
and every value of every tensor, are the key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PLACES = frozenset({"_name_or_path", "name_or_path"})
"""Attributes that say where a model lies, which is not what it is."""
OWN = ("torch.", "transformers.", "kilodelta.")
"""Classes of these packages alone: two tests may well define two classes of one name."""

Axes = Mapping[str, Mapping[int, str]]


def shared_folder(base: Path) -> Path:
    """Return where the traces of a run of the tests lie, given its folder of temporary files."""
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"


def remembered(trace: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """Wrap `kilodelta.export.onnx.trace.trace`, so that equal calls are answered from a folder."""

    def wrapped(view: nn.Module, batch: Mapping[str, Tensor], axes: Axes) -> Any:
        from kilodelta.export.onnx.trace import Trace

        name = key(view, batch, axes)
        if name is None:
            return trace(view, batch, axes)
        graph, facts = folder / f"{name}.onnx", folder / f"{name}.json"
        if not facts.exists():
            done = trace(view, batch, axes)
            _write(graph, _serialised(done.model))
            _write(facts, json.dumps([sorted(done.used), done.frozen]).encode())
        used, frozen = json.loads(facts.read_text())
        model = _deserialised(graph.read_bytes())
        return Trace(model=model, used=frozenset(used), frozen=tuple(frozen))

    return wrapped


def key(view: nn.Module, batch: Mapping[str, Tensor], axes: Axes) -> str | None:
    """Name what a trace depends on; None where a class is not a package's."""
    hasher = hashlib.sha256()

    def add(*parts: object) -> None:
        for part in parts:
            hasher.update(str(part).encode() + b"\0")

    for name, module in view.named_modules():
        kind = type(module)
        if not kind.__module__.startswith(OWN) or "<locals>" in kind.__qualname__:
            return None
        plain = {
            k: v
            for k, v in vars(module).items()
            if k not in PLACES and not isinstance(v, dict | set | Tensor)
        }
        add(
            name, kind.__module__, kind.__qualname__, sorted((k, repr(v)) for k, v in plain.items())
        )
        if hasattr(module, "config"):
            stated = vars(module.config).items()
            add(sorted((k, repr(v)) for k, v in stated if k not in PLACES))
    held = (*view.named_parameters(remove_duplicate=False), *view.named_buffers())
    places: dict[int, str] = {}
    for name, tensor in (*held, *batch.items()):
        # Two names of one tensor are one initializer: which names those are is part of the key.
        add(name, tensor.dtype, tuple(tensor.shape), places.setdefault(id(tensor), name))
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    add(json.dumps({name: {str(i): n for i, n in a.items()} for name, a in axes.items()}))
    return hasher.hexdigest()


def _serialised(model: Any) -> bytes:
    import onnx_ir as ir

    return bytes(ir.serde.serialize_model(model).SerializeToString())


def _deserialised(raw: bytes) -> Any:
    import onnx
    import onnx_ir as ir

    return ir.serde.deserialize_model(onnx.ModelProto.FromString(raw))


def _write(path: Path, raw: bytes) -> None:
    """Write a file whole before it has its name: another worker may look for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f"{path.suffix}.{os.getpid()}")
    part.write_bytes(raw)
    part.replace(path)
