"""Adapter mode on a device: one model for all fine-tunes, whose low-rank factors are its inputs.

A fine-tune's folder holds only its file of kilobytes. Its factors are expanded when it is first
used; from then on a switch binds other inputs.

Where the graph has slots, fine-tunes lie beside each other in its inputs and each row of a batch
names its own. Tables of slots are never changed, so requests under way keep theirs; the next one
has the fine-tunes that are asked for, and of the table before it those that there is room for.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.folder.fine_tune import DELTA
from kilodelta.device.modes import runtime
from kilodelta.device.modes.interface import Session, no_slots
from kilodelta.errors import require
from kilodelta.export.adapter.factors import Factors, base_factors, expand, in_slots
from kilodelta.export.adapter.layout import INDEX, read_layout
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.verify.runners.onnx_runner import OnnxRunner
from kilodelta.verify.runners.runner import Arrays, Batch


class AdapterMode:
    """The graph with its factors as inputs, opened once for all fine-tunes."""

    held = 64
    proves_result = False

    def __init__(self, folder: DeviceFolder) -> None:
        self._bundle = folder.bundle
        self._layout = read_layout(folder.base)
        self.runtime = runtime.version(folder.bundle)
        self._runner: Any = self._opened(folder.base)
        self._lock = threading.Lock()
        self._table: tuple[_Slots, Mapping[str, Any]] = ((), {})

    def build(self, delta: Delta, stage: Path) -> None:
        """See that the graph can take the delta, whose file is all that its folder needs."""
        expand(delta, self._layout)

    def open(self, folder: Path | None) -> Session:
        """Bind a fine-tune's factors, or zeros."""
        if folder is None:
            return self._base()
        return self.trial(load(folder / DELTA))

    def trial(self, delta: Delta) -> Session:
        """Bind the factors of any delta."""
        return self._bound(expand(delta, self._layout))

    def mixed(self, rows: Sequence[Session]) -> Session:
        """Bind a table of slots that has all of these fine-tunes.

        Raises:
            InputError: the graph has no slots, or fewer than fine-tunes.
        """
        if not self._layout.slots:
            raise no_slots()
        chosen: list[Any] = list(rows)
        slots, feeds = self._slots(dict.fromkeys(row for row in chosen if row.factors is not None))
        places: dict[Any, int] = {fine_tune: slot for slot, fine_tune in enumerate(slots, 1)}
        index = np.array([places.get(row, 0) for row in rows], np.int64)
        return _Switched(self._runner, {**feeds, INDEX: index})

    def _slots(self, wanted: Mapping[Any, None]) -> tuple[_Slots, Mapping[str, Any]]:
        """Return the fine-tunes in slots, all wanted ones among them, and the inputs for them."""
        slots, inputs = self._table  # replaced whole, never changed, so no lock to read it
        if inputs and wanted.keys() <= set(slots):
            return slots, inputs
        with self._lock:
            held, inputs = self._table
            if not inputs or wanted.keys() - set(held):
                rest = [one for one in held if one not in wanted]
                room = max(0, self._layout.slots - len(wanted))
                slots = (*wanted, *rest[:room])
                factors = [one.factors for one in slots if one.factors is not None]
                stacked = in_slots(self._layout, factors)
                self._table = (slots, self._prepared(stacked))
            return self._table

    def _base(self) -> Session:
        if self._layout.slots:
            return _InSlot(self, None)
        return self._bound(base_factors(self._layout))

    def _opened(self, folder: Path) -> Any:
        if runtime.is_engine(self._bundle):
            return runtime.open_runner(self._bundle, folder)
        device = runtime.provider(self._bundle)
        return runtime.ready(_Prepared(folder / runtime.ONNX, device=device))

    def _bound(self, factors: Factors) -> Session:
        if self._layout.slots:
            return _InSlot(self, factors)
        return _Switched(self._runner, self._prepared(factors))

    def _prepared(self, factors: Factors) -> Mapping[str, Any]:
        prepare = getattr(self._runner, "prepare", dict)
        prepared: Mapping[str, Any] = prepare(factors)
        return prepared


class _Switched:
    """One fine-tune: the shared runner, and the factors to feed beside a request's inputs."""

    def __init__(self, runner: Any, factors: Mapping[str, Any]) -> None:
        self._runner, self._factors = runner, factors

    def run(self, batch: Batch) -> Arrays:
        outputs: Arrays = self._runner.run({**batch, **self._factors})
        return outputs


class _InSlot:
    """One fine-tune of a graph with slots, or the base (None), which every table has."""

    def __init__(self, mode: AdapterMode, factors: Factors | None) -> None:
        self._mode, self.factors = mode, factors

    def run(self, batch: Batch) -> Arrays:
        rows = len(next(iter(batch.values()), ()))
        return self._mode.mixed([self] * rows).run(batch)


_Slots: TypeAlias = tuple[_InSlot, ...]


class _Prepared(OnnxRunner):
    """ONNX Runtime whose inputs may be values that were handed over to it before."""

    def prepare(self, factors: Factors) -> dict[str, Any]:
        """Turn factors into ONNX Runtime's own values, once per fine-tune."""
        kinds = {given.name: given.type for given in self._session.get_inputs()}
        return {name: self._value(factors, name, kinds[name]) for name in factors}

    def _value(self, batch: Batch, name: str, onnx_type: str) -> Any:
        value = batch.get(name)
        ort = require("onnxruntime", extra="cpu", why="run ONNX models")
        if isinstance(value, ort.OrtValue):
            return value
        return super()._value(batch, name, onnx_type)
