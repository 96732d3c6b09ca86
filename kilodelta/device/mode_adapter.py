"""Adapter mode on a device: one model for all fine-tunes, whose low-rank factors are its inputs.

A fine-tune's folder holds nothing but its file of kilobytes; the factors are expanded when it is
first used, and from then on switching is binding other inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.device import runners
from kilodelta.device.bundle import Bundle
from kilodelta.device.modes import DELTA, Session
from kilodelta.device.places import Places
from kilodelta.errors import require
from kilodelta.export.adapter_factors import Factors, base_factors, expand
from kilodelta.export.adapter_layout import read_layout
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.verify.run_onnx import OnnxRunner
from kilodelta.verify.runner import Arrays, Batch


class AdapterMode:
    """The graph with its factors as inputs, opened once for all fine-tunes."""

    held = 64

    def __init__(self, places: Places, bundle: Bundle) -> None:
        self._bundle = bundle
        self._layout = read_layout(places.base)
        self.runtime = runners.version(bundle)
        self._runner: Any = self._opened(places.base)

    def build(self, delta: Delta, stage: Path) -> None:
        """See that the graph can take the delta; its file is all that has to lie there."""
        expand(delta, self._layout)

    def open(self, folder: Path | None) -> Session:
        """A fine-tune's factors bound, or zeros."""
        if folder is None:
            return self._bound(base_factors(self._layout))
        return self.trial(load(folder / DELTA))

    def trial(self, delta: Delta) -> Session:
        """The same for a delta from anywhere."""
        return self._bound(expand(delta, self._layout))

    def _opened(self, folder: Path) -> Any:
        if runners.is_engine(self._bundle):
            return runners.open_runner(self._bundle, folder)
        device = runners.provider(self._bundle)
        return runners.ready(_Prepared(folder / runners.ONNX, device=device))

    def _bound(self, factors: Factors) -> Session:
        prepare = getattr(self._runner, "prepare", dict)
        return _Switched(self._runner, prepare(factors))


class _Switched:
    """One fine-tune: the shared runner, and the factors to feed beside a request's inputs."""

    def __init__(self, runner: Any, factors: Mapping[str, Any]) -> None:
        self._runner, self._factors = runner, factors

    def run(self, batch: Batch) -> Arrays:
        found: Arrays = self._runner.run({**batch, **self._factors})
        return found


class _Prepared(OnnxRunner):
    """ONNX Runtime whose inputs may be values that were handed over to it before."""

    def prepare(self, factors: Factors) -> dict[str, Any]:
        """Factors as ONNX Runtime's own values, made once a fine-tune."""
        kinds = {given.name: given.type for given in self._session.get_inputs()}
        return {name: self._value(factors, name, kinds[name]) for name in factors}

    def _value(self, batch: Batch, name: str, onnx_type: str) -> Any:
        value = batch.get(name)
        ort = require("onnxruntime", extra="cpu", why="run ONNX models")
        if isinstance(value, ort.OrtValue):
            return value
        return super()._value(batch, name, onnx_type)
