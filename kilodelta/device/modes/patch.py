"""Patch mode on a device: the tuned ONNX file or engine, made of the base's by byte offsets.

An engine's format is TensorRT's own, so what was patched there counts only where it is, byte for
byte, what a build machine got: a release states that digest for every engine that it was built for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.modes import runtime
from kilodelta.device.modes.interface import Session, no_slots
from kilodelta.errors import ExportError
from kilodelta.export.manifest.facts import FileFact
from kilodelta.export.patching.map_file import read_map
from kilodelta.export.patching.rewrite import patch
from kilodelta.export.patching.session import open_patched
from kilodelta.files import staging
from kilodelta.format.delta import Delta
from kilodelta.verify.runners.onnx_runner import PROVIDERS, OnnxRunner

MAP, REST = "model.map.json", "rest.safetensors"
"""The map of the base's file, and the weights that the file does not hold exactly."""

RECIPE = "recipe.json"
"""For an engine: what it was built for, and with which TensorRT."""

BUILT = "engine "
"""A `.kd` file's `made` has an entry of this and an engine's digest: that of the fine-tune's own
engine, as a build machine has built it."""


class PatchMode:
    """The base's ONNX file or engine, and its map."""

    held = 2
    proves_result = True

    def __init__(self, folder: DeviceFolder) -> None:
        self._bundle, self._base = folder.bundle, folder.base
        self._name = runtime.file_name(folder.bundle)
        self._model = folder.base / self._name
        self.runtime = runtime.version(folder.bundle)
        rest = folder.base / REST
        self._source: dict[str, Any] = {
            "places": read_map(folder.base / MAP),
            "base": rest if rest.exists() else None,
        }

    def build(self, delta: Delta, stage: Path) -> None:
        """Write the tuned file, its changed weights proved; an engine as a build machine built it.

        Raises:
            ExportError: a weight has no place, or the release was not built for this engine.
        """
        promised = None
        if runtime.is_engine(self._bundle):
            promised = promised_digest(delta, self._source["places"].files[0])
        patch(self._model, delta, stage / self._name, promised=promised, **self._source)

    def open(self, folder: Path | None) -> Session:
        """Open the tuned file, or the base's, in its runtime."""
        return runtime.open_runner(self._bundle, folder or self._base)

    def trial(self, delta: Delta) -> Session:
        """Open the base's ONNX file with the tuned weights in memory, or a patched copy for now.

        Of an engine, and of codes in external data, which a session takes from no array.
        """
        places = self._source["places"]
        if runtime.is_engine(self._bundle) or (places.outline and len(places.files) > 1):
            with staging.scratch() as stage:  # gone as soon as it is loaded
                self.build(delta, stage)
                return self.open(stage)
        runner = _InMemory(self._model, delta, self._source, runtime.provider(self._bundle))
        return runtime.ready(runner)

    def mixed(self, rows: Sequence[Session]) -> Session:
        """Refuse: the weights of one file are one fine-tune's."""
        raise no_slots()


def promised_digest(delta: Delta, engine: FileFact) -> str:
    """Return the digest that a fine-tune's engine must have, patched from this engine.

    Raises:
        ExportError: the file states none.
    """
    promised = delta.manifest.made.get(f"{BUILT}{engine.sha256}")
    if not isinstance(promised, str):
        raise ExportError(
            f"the file was not released for this device's engine, {engine.sha256}",
            fix="release it with --engine and this device folder: kilodelta release ... --engine",
        )
    return promised


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
