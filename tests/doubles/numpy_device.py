"""A device folder without any runtime: a linear model in numpy behind the modes' interface.

What it serves is computed from the very files that an apply writes, so a mixture of two fine-tunes
would show in its outputs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.device import modes
from kilodelta.device.folder import Bundle, DeviceFolder
from kilodelta.device.golden import golden
from kilodelta.device.golden.golden import Golden
from kilodelta.device.modes import interface
from kilodelta.errors import ProofError
from kilodelta.files import model_digest
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.merging import build, cpu
from kilodelta.verify.parity.gate import Limit
from tests.support.making import write

PATTERNS = Patterns(include=("*.weight",), exclude=("norm*",))
TOLERANCE = Limit(relative_l2=1e-5, relative_max=1e-5)
BATCH = {"x": np.random.default_rng(5).normal(size=(3, 8)).astype(np.float32)}


class Linear:
    """y = B A x + c."""

    def __init__(self, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        self.tensors = tensors

    def run(self, batch: Any) -> dict[str, np.ndarray[Any, Any]]:
        """Compute `y`, or refuse other inputs as the runtimes' sessions do.

        Raises:
            ProofError: there is no `x`, float32 (rows, 8), or a weight has another shape than the
                base's, because the device's list of tensors says so.
        """
        x = batch.get("x")
        if x is None or x.dtype != np.float32 or x.shape[1:] != (8,):
            raise ProofError("numpy cannot compute these inputs", fix="give x, float32 (rows, 8)")
        try:
            hidden = x @ self.tensors["a.weight"].T
            return {"y": hidden @ self.tensors["b.weight"].T + self.tensors["norm.bias"]}
        except ValueError as error:
            raise ProofError(f"numpy cannot compute: {error}", fix="make the folder anew") from None


class StandIn:
    """Writes one file a tensor, slowly if asked, so that a kill finds it half-done."""

    held = 4
    proves_result = True
    runtime = "numpy"

    def __init__(self, folder: DeviceFolder) -> None:
        self.base = Checkpoint.open(folder.base / "weights.safetensors")

    def build(self, delta: Delta, stage: Path) -> None:
        for name, array in self._merged(delta).items():
            np.save(stage / f"{name}.npy", array)
            time.sleep(float(os.environ.get("STANDIN_PAUSE", "0")))

    def open(self, folder: Path | None) -> Linear:
        if folder is None:
            return of_checkpoint(self.base)
        return Linear({name: np.load(folder / f"{name}.npy") for name in self.base.names})

    def trial(self, delta: Delta) -> Linear:
        return Linear(self._merged(delta))

    def mixed(self, rows: Sequence[interface.Session]) -> interface.Session:
        raise interface.no_slots()

    def _merged(self, delta: Delta) -> dict[str, np.ndarray[Any, Any]]:
        found = dict(of_checkpoint(self.base).tensors)
        for name, target in delta.targets.items():
            parts = [part.copy() for part in cpu.merged(delta, target, self.base.data(name))]
            found[name] = np.concatenate(parts).view(np.float32).reshape(target.shape)
        for name, tensor in delta.extras.items():
            found[name] = tensor.data.view(np.float32).reshape(tensor.shape)
        return found


def of_checkpoint(checkpoint: Checkpoint) -> Linear:
    """The linear model of a checkpoint."""
    return Linear(
        {
            name: checkpoint.data(name).view(np.float32).reshape(checkpoint.info(name).shape)
            for name in checkpoint.names
        }
    )


def install() -> None:
    """Let the "patch" mode be the stand-in, in this process."""
    modes.OPENERS["patch"] = StandIn


def base(path: Path, seed: int = 0) -> Path:
    """The linear model's checkpoint."""
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (12, 8), "b.weight": (5, 12), "norm.bias": (5,)}
    return write(
        path,
        {
            name: ("F32", shape, rng.normal(size=shape).astype("<f4").tobytes())
            for name, shape in shapes.items()
        },
    )


def folder(path: Path, source: Path, **settings: Any) -> Path:
    """A device folder that serves the base; `settings` are fields of its bundle."""
    base = path / "base"
    base.mkdir(parents=True)
    checkpoint = Checkpoint.open(source)
    (base / "weights.safetensors").write_bytes(source.read_bytes())
    outputs = of_checkpoint(checkpoint).run(BATCH)
    golden.write(base / golden.FILE, Golden(inputs=BATCH, outputs=outputs))
    known = model_digest.digest(checkpoint)
    fields: dict[str, Any] = {
        "mode": "patch",
        "dtype": "float32",
        "runtime": "onnxruntime-cpu",
        "base_name": "test/linear",
        "base_root": known.root,
        "files": (),
        "limits": {"y": TOLERANCE},
        "ceiling": 0.01,
    }
    infos = {name: checkpoint.info(name) for name in checkpoint.names}
    DeviceFolder.create(path, Bundle(**fields | settings), infos=infos, identity=known)
    return path


def delta(source: Path, seed: int, *, version: int | None = None, **parts: Any) -> Delta:
    """A fine-tune of the linear model; `parts` are probes and extras."""
    rng = np.random.default_rng(seed)
    method = Lora(rank=2)
    numbers = {
        target.name: build.quantise_target(
            method, {g.name: rng.normal(size=g.shape) for g in method.groups(target)}, 8
        )
        for target in build.targets(source, PATTERNS)
    }
    made: dict[str, str | int | float | bool] = {} if version is None else {"version": version}
    recipe = build.Recipe(method=method, patterns=PATTERNS, seed=seed, made=made, **parts)
    return build.build(source, recipe, numbers)
