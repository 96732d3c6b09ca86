"""Take one tiny architecture through every step, each compared with transformers' own model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

import kilodelta
from kilodelta.compress import Options, compress
from kilodelta.device import Device, apply, bundle
from kilodelta.device.modes import runtime
from kilodelta.errors import KiloDeltaError
from kilodelta.export import export
from kilodelta.export.onnx import named
from kilodelta.export.onnx.trace import Trace, trace
from kilodelta.format.methods import Lora
from kilodelta.models.heads import flatten
from kilodelta.models.twin import content_of
from kilodelta.verify import verify
from tests.models.architectures import Architecture, Batch, modules
from tests.support import pico

NEEDS: Mapping[str, str | None] = {
    "compress": None,
    "merge": "compress",
    "export": "merge",
    "verify": "export",
    "adapter": "merge",
    "patch": "merge",
    "engine": "export",
}
"""The steps, in turn, each with the one that must have ended right before it."""

USUAL = frozenset(NEEDS) - {"engine"}

RIGHT, REFUSED, WRONG, TRACEBACK = "right", "refused", "WRONG", "TRACEBACK"
ROWS = 12
"""Rows of the inputs that are compressed with: some are trained on, some held out."""
_CLOSE = 1e-3
"""Relative L2 error of a right output: rounding of float32 lies far below, a mistake far above."""


class WrongError(Exception):
    """A step ended well, and its result is not what transformers computes."""


def run(architecture: Architecture, folder: Path, steps: Container[str] = USUAL) -> dict[str, str]:
    """Do each step whose need is met.

    Args:
        architecture: a row of the table.
        folder: empty; a few megabytes are written.
        steps: those to do; by default all but the engine.

    Returns:
        By step `right` (`right: <remark>`), `refused: <sentence>`, `WRONG: <what>` or
        `TRACEBACK: <error>`; what was not tried is missing.
    """
    case = (Case if architecture.config else _ModuleCase)(architecture, folder)
    outcomes: dict[str, str] = {}
    with _traces_shared():
        for step, need in NEEDS.items():
            is_met = need is None or is_right(outcomes.get(need, ""))
            if is_met and step in steps:
                outcomes[step] = _outcome(getattr(case, step), folder)
    return outcomes


@contextmanager
def _traces_shared() -> Iterator[None]:
    """Let exports of one twin, at the same sizes, share what torch traces: it takes most time.

    The export, the adapter graph and the patched graph of one architecture begin with the same
    trace of the same twin, so what is traced again would be the same.
    """
    traces: dict[str, Trace] = {}

    def traced(view: Any, batch: Batch, axes: Mapping[str, Mapping[int, str]]) -> Trace:
        state = hashlib.sha256(repr((type(view.module), view.chosen, axes)).encode())
        tensors = {**view.module.state_dict(), **{f"input {n}": t for n, t in batch.items()}}
        for name, tensor in tensors.items():
            state.update(f"{name} {tensor.dtype} {content_of(tensor)} ".encode())
        key = state.hexdigest()
        if key not in traces:
            traces[key] = trace(view, batch, axes)
        return replace(traces[key], model=traces[key].model.clone())

    with mock.patch.object(named, "trace", traced):
        yield


def is_right(outcome: str) -> bool:
    """Return whether a step ended right, with or without a remark."""
    return outcome.partition(":")[0] == RIGHT


def _outcome(work: Callable[[], str | None], folder: Path) -> str:
    try:
        remark = work()
    except KiloDeltaError as error:
        # Temporary names differ from run to run, and say nothing.
        return f"{REFUSED}: {_plain(error.what, folder)} (fix: {_plain(error.fix, folder)})"
    except WrongError as error:
        return f"{WRONG}: {error}"
    except Exception as error:  # a traceback is what a user must never see
        return f"{TRACEBACK}: {type(error).__name__}: {_plain(str(error), folder)}"
    return f"{RIGHT}: {remark}" if remark else RIGHT


def _plain(text: str, folder: Path) -> str:
    """Put a sentence on one line, without the folder's name, 400 characters at most."""
    return " ".join(text.replace(f"{folder}/", "").split())[:400]


class Case:
    """One architecture's folders, and the steps between them."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.of, self.folder = architecture, folder
        self.base, self.tuned = folder / "base", folder / "tuned"
        self.delta, self.merged, self.out = folder / "a.kd", folder / "merged", folder / "out"
        self.model: str | None = None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self._build()
        pico.tuned(self.base, self.tuned, size=0.1)
        self.inputs = str(folder / "in.npz")
        batch = architecture.inputs(ROWS, architecture.sizes[1][1])
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in batch.items()}
        np.savez(self.inputs, **arrays)
        self._expected: list[dict[str, Any]] = []

    def _build(self) -> None:
        """Write the base."""
        self.kind = getattr(transformers, self.of.model)
        config = getattr(transformers, self.of.config)(**self.of.options)
        pico.save(lambda: self.kind(config), self.base)

    def _open(self, folder: Path) -> Any:
        """Open a folder as its own library does."""
        model = self.kind.from_pretrained(folder, dtype=torch.float32)
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        return model

    def compress(self) -> None:
        """Train a LoRA of rank 2 for a few steps, against the tuned model's outputs."""
        options = Options(method=Lora(rank=2), steps=4, batch=4, model=self.model)
        compress(self.base, self.tuned, self.delta, inputs=self.inputs, options=options)

    def merge(self) -> None:
        """Merge; transformers opens the folder, and it computes what the base does not."""
        kilodelta.merge(self.base, self.delta, self.merged)
        before, after = self._outputs(self.base), self._outputs(self.merged)
        pairs = [(a[n], b[n]) for a, b in zip(after, before, strict=True) for n in b]
        if not any(_error(new, old) > 1e-6 for new, old in pairs):
            raise WrongError("the merged model computes what the base computes")
        self._expected = after

    def export(self) -> str:
        """Export to ONNX; ONNX Runtime computes every output at three sizes."""
        export(self.base, self.delta, self.out, inputs=self.inputs, model=self.model)
        import onnxruntime

        session = onnxruntime.InferenceSession(
            self.out / "model.fp32.onnx", providers=["CPUExecutionProvider"]
        )
        taken = {port.name: port for port in session.get_inputs()}
        if absent := [name for name in self.of.inputs(1, 8) if name not in taken]:
            raise WrongError(f"the graph has no input {', '.join(absent)}")
        names = [port.name for port in session.get_outputs()]

        def compute(batch: Mapping[str, Any]) -> dict[str, Any]:
            return dict(zip(names, session.run(names, dict(batch)), strict=True))

        return self._compare(compute, {name: tuple(port.shape) for name, port in taken.items()})

    def verify(self) -> None:
        """Verify the export with inputs, as a user does."""
        options: dict[str, Any] = {"inputs": self.inputs, "model": self.model}
        failure = verify(self.base, self.delta, [self.out], **options).failure
        if failure is not None:
            raise failure

    def adapter(self) -> str:
        """Apply to a device folder whose graph takes the update's factors as inputs."""
        remark = self._device("adapter", rank=2, whole=self.of.whole)
        named = [f"--whole {name}" for name in self.of.whole]
        return "; ".join(filter(None, (*named, remark)))

    def patch(self) -> str:
        """Apply to a device folder whose model file is patched."""
        return self._device("patch")

    def engine(self) -> None:
        """Build a TensorRT-RTX engine for GPUs of compute capability 8.6; it is not run."""
        options: dict[str, Any] = {"inputs": self.inputs, "model": self.model}
        export(self.base, self.delta, self.folder / "engine", tensorrt="sm86", **options)

    def _device(self, mode: str, **options: Any) -> str:
        folder = self.folder / mode
        bundle(self.base, folder, mode=mode, probe=self.inputs, model=self.model, **options)
        apply(folder, self.delta)
        ports = onnx_ports(folder / "base" / runtime.ONNX)
        return self._compare(Device(folder).run, ports)

    def _compare(
        self,
        compute: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        shapes: Mapping[str, tuple[Any, ...]],
    ) -> str:
        """Hold outputs against those of the merged folder, at each size that the axes allow."""
        compared = 0
        for (rows, size), expected in zip(self.of.sizes, self._expected, strict=True):
            batch = self.of.inputs(rows, size)
            if not _fits(batch, shapes):
                continue  # an axis is fixed, and declared as such
            actual = compute({name: tensor.numpy() for name, tensor in batch.items()})
            if lost := [name for name in expected if name not in actual]:
                raise WrongError(f"there is no output {', '.join(lost)}")
            for name, wanted in expected.items():
                if (error := _error(actual[name], wanted)) > _CLOSE:
                    raise WrongError(f"{name} is off by {error:.2g} at {rows} x {size}")
            compared += 1
        if not compared:
            raise WrongError("no size could be compared")
        count = len(self.of.sizes)
        return "" if compared == count else f"{compared} of {count} sizes, an axis is fixed"

    def _outputs(self, folder: Path) -> list[dict[str, Any]]:
        """What transformers, or the module itself, computes at each size, by name."""
        model = self._open(folder).eval()
        with torch.no_grad():
            results = [model(**self.of.inputs(*size)) for size in self.of.sizes]
        return [
            {name: tensor.numpy() for name, tensor in flatten(result).items()} for result in results
        ]


class _ModuleCase(Case):
    """A plain module: its folders hold bare weights, and a function builds it."""

    def _build(self) -> None:
        name = self.of.name.replace("-", "_")
        self.model, self.make = f"{modules.__name__}:{name}", getattr(modules, name)
        pico.save_module(self.make, self.base)

    def _open(self, folder: Path) -> Any:
        module = self.make()
        module.load_state_dict(load_file(folder / "model.safetensors"))
        return module


def onnx_ports(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return the shapes of a graph's inputs by name, axes that vary by their names."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return {
        port.name: tuple(d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim)
        for port in graph.input
    }


def _fits(batch: Batch, shapes: Mapping[str, tuple[Any, ...]]) -> bool:
    """Return whether every axis that is fixed has the batch's size."""
    return all(
        not isinstance(size, int) or size == given
        for name, tensor in batch.items()
        for size, given in zip(shapes[name], tensor.shape, strict=True)
    )


def _error(actual: Any, expected: Any) -> float:
    """Relative L2 error; the share of wrong elements of what is no float."""
    if actual.shape != expected.shape:
        return float("inf")
    if expected.dtype.kind != "f":
        return float(np.mean(actual != expected))
    difference = np.linalg.norm((actual.astype(np.float64) - expected).ravel())
    return float(difference / (np.linalg.norm(expected.ravel()) or 1.0))
