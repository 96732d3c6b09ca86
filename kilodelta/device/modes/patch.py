"""Patch mode on a device: the tuned ONNX file, made of the base's by byte offsets, beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.places import Places
from kilodelta.device.modes import runtime
from kilodelta.device.modes.interface import Session, no_slots
from kilodelta.export.patching.map import read_map
from kilodelta.export.patching.rewrite import patch
from kilodelta.export.patching.session import open_patched
from kilodelta.format.delta import Delta
from kilodelta.verify.runners.onnx_runner import PROVIDERS, OnnxRunner

MAP, REST = "model.map.json", "rest.safetensors"


class PatchMode:
    """The base's ONNX file, its map, and the weights that it does not hold exactly."""

    held = 2

    def __init__(self, places: Places, bundle: Bundle) -> None:
        self._bundle, self._folder = bundle, places.base
        self._model = places.base / runtime.ONNX
        self.runtime = runtime.version(bundle)
        rest = places.base / REST
        self._source: dict[str, Any] = {
            "places": read_map(places.base / MAP),
            "base": rest if rest.exists() else None,
        }

    def build(self, delta: Delta, stage: Path) -> None:
        """Write the tuned ONNX file, its changed weights proved."""
        patch(self._model, delta, stage / runtime.ONNX, **self._source)

    def open(self, folder: Path | None) -> Session:
        """ONNX Runtime on the tuned file, or on the base's."""
        return runtime.open_runner(self._bundle, folder or self._folder)

    def trial(self, delta: Delta) -> Session:
        """ONNX Runtime with the tuned weights in memory."""
        runner = _InMemory(self._model, delta, self._source, runtime.provider(self._bundle))
        found: Session = runtime.ready(runner)
        return found

    def mixed(self, rows: Sequence[Session]) -> Session:
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
