"""Patch mode on a device: the tuned ONNX file, made of the base's by byte offsets, beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.modes import runtime
from kilodelta.device.modes.interface import Session, no_slots
from kilodelta.export.patching.map import read_map
from kilodelta.export.patching.rewrite import patch
from kilodelta.export.patching.session import open_patched
from kilodelta.format.delta import Delta
from kilodelta.verify.runners.onnx_runner import PROVIDERS, OnnxRunner

MAP, REST = "model.map.json", "rest.safetensors"
"""The map of the base's ONNX file, and the weights that the file does not hold exactly."""


class PatchMode:
    """The base's ONNX file and its map."""

    held = 2
    proves_result = True

    def __init__(self, folder: DeviceFolder) -> None:
        self._bundle, self._base = folder.bundle, folder.base
        self._model = folder.base / runtime.ONNX
        self.runtime = runtime.version(folder.bundle)
        rest = folder.base / REST
        self._source: dict[str, Any] = {
            "places": read_map(folder.base / MAP),
            "base": rest if rest.exists() else None,
        }

    def build(self, delta: Delta, stage: Path) -> None:
        """Write the tuned ONNX file, its changed weights proved."""
        patch(self._model, delta, stage / runtime.ONNX, **self._source)

    def open(self, folder: Path | None) -> Session:
        """Open the tuned file, or the base's, in ONNX Runtime."""
        return runtime.open_runner(self._bundle, folder or self._base)

    def trial(self, delta: Delta) -> Session:
        """Open the base's file in ONNX Runtime with the tuned weights in memory."""
        runner = _InMemory(self._model, delta, self._source, runtime.provider(self._bundle))
        return runtime.ready(runner)

    def mixed(self, rows: Sequence[Session]) -> Session:
        """Refuse: the weights of one file are one fine-tune's."""
        raise no_slots()


class _InMemory(OnnxRunner):
    """The base's file with a delta's weights, no file written."""

    def __init__(self, model: Path, delta: Delta, source: dict[str, Any], device: str) -> None:
        super().__init__(model, device=device)
        self._delta, self._source = delta, source

    def _create(self, ort: Any) -> Any:
        return open_patched(
            self._model,  # type: ignore[arg-type]
            self._delta,
            options=self._options(ort),
            providers=PROVIDERS[self._device],
            **self._source,
        )
