"""A device folder's own files: bundle, current, journal, golden values, built fine-tunes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.device import apply, modes, rollback, run, status
from kilodelta.device.folder import DeviceFolder, changing
from kilodelta.device.modes import patch
from kilodelta.files.npz import write_npz
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from tests.doubles import numpy_device
from tests.doubles.numpy_device import BATCH
from tests.fuzz.containers import npz_changed
from tests.fuzz.harness import Read, Surface
from tests.fuzz.mutations import Mutate, bytes_changed, json_changed, json_lines_changed


def _device(then: Callable[[Path, Path], Any]) -> Callable[[Path, Path], Read]:
    """A device of the linear model that serves a fine-tune; `then` is done with it."""

    def make(example: Path, trusted: Path) -> Read:
        modes.OPENERS["patch"] = numpy_device.StandIn
        base = numpy_device.base(trusted / "base.safetensors")
        numpy_device.folder(example / "device", base)
        for seed in (1, 2):
            numpy_device.delta(base, seed, version=seed).save(trusted / f"{seed}.kd")
        apply(example / "device", trusted / "1.kd")
        write_npz(trusted / "inputs.npz", BATCH)
        return lambda work: then(work / "device", trusted)

    return make


def _real(example: Path, trusted: Path) -> Read:
    """A device of a pico model in ONNX Runtime, patched by a released fine-tune."""
    from kilodelta.device import bundle, release
    from tests.support import making, pico

    modes.OPENERS["patch"] = patch.PatchMode
    base = pico.sentence_bert(trusted / "base", layers=1)
    bundle(base, example / "device", mode="patch")
    patterns = Patterns(include=("encoder.*.dense.weight",))
    making.delta(base, Lora(rank=2), patterns=patterns).save(trusted / "raw.kd")
    (trusted / "x.txt").write_text("\n".join(pico.TEXTS))
    release(base, trusted / "raw.kd", trusted / "2.kd", version=2, inputs=str(trusted / "x.txt"))
    ids = np.array([[2, 5, 6, 7, 3], [2, 9, 3, 0, 0]])
    write_npz(example / "inputs.npz", {"input_ids": ids, "attention_mask": (ids > 0) * 1})

    def read(work: Path) -> None:
        run(work / "device", work / "inputs.npz")
        _change(work / "device", trusted)

    return read


def _look(device: Path, trusted: Path) -> None:
    json.dumps(status(device, check=True).to_json(), allow_nan=False)
    run(device, trusted / "inputs.npz")


def _recover(device: Path, trusted: Path) -> None:
    status(device)
    with changing(DeviceFolder.open(device)) as change:
        change.note("proved")


def _change(device: Path, trusted: Path) -> None:
    apply(device, trusted / "2.kd")
    status(device, check=True)
    rollback(device)


def _surface(
    name: str, then: Callable[[Path, Path], Any], mutate: dict[str, tuple[Mutate, ...]]
) -> Surface:
    return Surface(
        name=name,
        make=_device(then),
        mutate={f"device/{key}": value for key, value in mutate.items()},
    )


SURFACES = (
    _surface(
        "bundle", _look, {"bundle.json": (json_changed,), "base/tensors.json": (json_changed,)}
    ),
    _surface("current", _recover, {"current": (json_changed,), "lock": (bytes_changed,)}),
    _surface("journal", _recover, {"journal": (json_lines_changed,)}),
    _surface(
        "golden", _change, {"base/golden.npz": (npz_changed,), "baseline.npz": (npz_changed,)}
    ),
    Surface(
        name="onnxruntime",
        make=_real,
        mutate={"*.npz": (npz_changed,), "device/base/map.json": (json_changed,)},
        needs=("torch", "transformers", "onnxscript", "onnxruntime"),
    ),
    Surface(
        name="fine-tune",
        make=_device(_change),
        mutate={"*.json": (json_changed,), "*.kd": (bytes_changed,), "*.npy": (bytes_changed,)},
    ),
)
