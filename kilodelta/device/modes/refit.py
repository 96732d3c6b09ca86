"""Refit mode on a device: the engine of a fine-tune, refitted from the base's and saved beside it.

It needs the GPU that the engine was built for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.places import Places
from kilodelta.device.modes import runtime
from kilodelta.device.modes.interface import Session, no_slots
from kilodelta.errors import DeviceError
from kilodelta.export.tensorrt.refit import RefitEngine
from kilodelta.files import canonical, staging, untrusted
from kilodelta.format.delta import Delta

WEIGHTS, FACTS = "weights.safetensors", "refit.json"


class RefitMode:
    """The base's engine, and the weights in it that a delta may change."""

    held = 1

    def __init__(self, places: Places, bundle: Bundle) -> None:
        self._bundle, self._folder = bundle, places.base
        self.runtime = runtime.version(bundle)

    def build(self, delta: Delta, stage: Path) -> None:
        """Refit the base's engine with proved weights, and save it."""
        engine = RefitEngine(
            self._folder / runtime.ENGINE,
            self._folder / WEIGHTS,
            flavour=self._bundle.runtime,
            unused=read_unused(self._folder),
        )
        engine.refit(delta)
        engine.save(stage / runtime.ENGINE)

    def open(self, folder: Path | None) -> Session:
        """TensorRT on the refitted engine, or on the base's."""
        return runtime.open_runner(self._bundle, folder or self._folder)

    def trial(self, delta: Delta) -> Session:
        """An engine refitted for now; its file is gone as soon as it is loaded."""
        with tempfile.TemporaryDirectory() as stage:
            self.build(delta, Path(stage))
            return self.open(Path(stage))

    def mixed(self, rows: Sequence[Session]) -> Session:
        raise no_slots()


def write_unused(folder: Path, unused: Sequence[str]) -> None:
    """Write down the tensors that the outputs do not depend on."""
    staging.write(folder / FACTS, canonical.dumps({"unused": list(unused)}).encode())


def read_unused(folder: Path) -> tuple[str, ...]:
    """Read them.

    Raises:
        DeviceError: they are missing or damaged.
    """
    try:
        table = untrusted.table(
            canonical.loads((folder / FACTS).read_bytes()), "refit", ("unused",)
        )
        return untrusted.texts(table["unused"], "unused")
    except (OSError, ValueError) as problem:
        raise DeviceError(
            f"{folder / FACTS} is wrong: {problem}", fix="copy the bundle to the device again"
        ) from None
