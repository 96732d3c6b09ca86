"""Refit mode on a device: the engine of a fine-tune, refitted from the base's and saved beside it.

It needs the GPU that the engine was built for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilodelta.device.folder.bundle import read_json
from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.modes import runtime
from kilodelta.device.modes.interface import Session, no_slots
from kilodelta.export.tensorrt.refit import RefitEngine
from kilodelta.files import canonical, staging, untrusted
from kilodelta.format.delta import Delta

WEIGHTS, FACTS = "weights.safetensors", "refit.json"
"""The base's weights that a delta may change, and what else is known of the engine."""

_LIMIT = 16 << 20


class RefitMode:
    """The base's engine, and the weights in it that a delta may change."""

    held = 1
    proves_result = True

    def __init__(self, folder: DeviceFolder) -> None:
        self._bundle, self._base = folder.bundle, folder.base
        self.runtime = runtime.version(folder.bundle)

    def build(self, delta: Delta, stage: Path) -> None:
        """Refit the base's engine with proved weights, and save it."""
        engine = RefitEngine(
            self._base / runtime.ENGINE,
            self._base / WEIGHTS,
            flavour=self._bundle.runtime,
            unused=read_unused(self._base),
        )
        engine.refit(delta)
        engine.save(stage / runtime.ENGINE)

    def open(self, folder: Path | None) -> Session:
        """Open the refitted engine, or the base's, in TensorRT."""
        return runtime.open_runner(self._bundle, folder or self._base)

    def trial(self, delta: Delta) -> Session:
        """Open an engine refitted for now; its file is gone as soon as it is loaded."""
        with staging.scratch() as stage:
            self.build(delta, stage)
            return self.open(stage)

    def mixed(self, rows: Sequence[Session]) -> Session:
        """Refuse: the weights of one engine are one fine-tune's."""
        raise no_slots()


def write_unused(base: Path, unused: Sequence[str]) -> None:
    """Write the names of tensors that the outputs do not depend on into a folder's `base/`.

    Raises:
        OutputError: the file cannot be written.
    """
    staging.write(base / FACTS, canonical.dumps({"unused": list(unused)}).encode())


def read_unused(base: Path) -> tuple[str, ...]:
    """Read the names that `write_unused` wrote.

    Raises:
        DeviceError: the file is missing or damaged.
    """
    return read_json(base / FACTS, _LIMIT, _unused)


def _unused(value: Any) -> tuple[str, ...]:
    return untrusted.texts(untrusted.table(value, "refit", {"unused"})["unused"], "unused")
