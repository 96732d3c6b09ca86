"""Computing with a device folder: what is served now, or any other fine-tune for one request."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kilodelta.device.folder import bundle as bundles
from kilodelta.device.folder import state
from kilodelta.device.folder.places import Places
from kilodelta.device.modes import Mode, Session, open_mode
from kilodelta.device.update import admit
from kilodelta.errors import InputError, KiloDeltaError
from kilodelta.files import digest_cache
from kilodelta.verify.runners.runner import Arrays

BASE = "base"
"""The name by which `run` takes the base itself."""

_ATTEMPTS = 5


class Device:
    """A device folder opened for computing; threads may share it.

    An `apply` or `rollback` by another process is seen by the next call. What was read before goes
    on being used until then: nothing is ever changed in place.

    Raises:
        DeviceError: no device folder, or a damaged one.
        MissingPackageError: the runtime is not installed.

    Example:
        >>> device = Device("device/")  # doctest: +SKIP
        >>> device.run({"input_ids": ids, "attention_mask": mask})["embedding"]  # doctest: +SKIP
        >>> device.run(batch, delta="other.kd")  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.places = Places.open(folder)
        self.bundle = bundles.read(self.places)
        self._mode: Mode = open_mode(self.places, self.bundle)
        self._sessions: OrderedDict[Any, Session] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def _tensors(self) -> bundles.Tensors:
        return bundles.read_tensors(self.places)

    @property
    def state(self) -> state.State:
        """What is served now, and what a rollback goes back to."""
        return state.read(self.places)

    def run(
        self,
        batch: Mapping[str, NDArray[Any]],
        delta: str | os.PathLike[str] | None = None,
        *,
        deltas: Sequence[str | os.PathLike[str] | None] | None = None,
    ) -> Arrays:
        """The outputs by name.

        Args:
            batch: the inputs by name.
            delta: a `.kd` file to compute this request with, or "base"; by default what is served.
            deltas: the same for each row of the batch, where the folder was bundled with slots.

        Raises:
            FileError, BaseMismatchError, InputError: the file is damaged, for another base, or of a
                kind that this folder's mode cannot take; or there are more fine-tunes than slots,
                or not as many as rows.
            ProofError: the model does not take these inputs.
        """
        if deltas is None:
            return self.session(delta).run(batch)
        _check_rows(batch, delta, deltas)
        return self._mode.mixed([self.session(one) for one in deltas]).run(batch)

    def session(self, delta: str | os.PathLike[str] | None = None) -> Session:
        """What `run` computes with; it stays the same fine-tune whatever is applied later."""
        if delta is None:
            return self._served()
        if str(delta) == BASE:
            return self._held("", lambda: self._mode.open(None))
        path = Path(delta)
        return self._held(_key(path), lambda: self._trial(path))

    def _served(self) -> Session:
        """The current fine-tune. One that is so old that it was removed while it was being opened
        is no longer the current one: look again."""
        for _ in range(_ATTEMPTS):
            name = self.state.serving.folder
            folder = self.places.deltas / name if name else None
            try:
                return self._held(name, lambda folder=folder: self._mode.open(folder))  # type: ignore[misc]
            except (OSError, KiloDeltaError):
                if self.state.serving.folder == name:
                    raise
        raise KiloDeltaError(
            f"{self.places.root} changes faster than it can be read",
            fix="wait until nothing is applied any more",
        )

    def _trial(self, path: Path) -> Session:
        from kilodelta.format.file import load

        return self._mode.trial(admit.bind(self.bundle, self._tensors, load(path)))

    def _held(self, key: Any, make: Callable[[], Session]) -> Session:
        """A session made once; the one that was not used for longest gives way."""
        with self._lock:
            if key not in self._sessions:
                self._sessions[key] = make()
            self._sessions.move_to_end(key)
            while len(self._sessions) > self._mode.held:
                self._sessions.popitem(last=False)
            return self._sessions[key]


def _check_rows(batch: Mapping[str, NDArray[Any]], delta: Any, deltas: Sequence[Any]) -> None:
    if delta is not None:
        raise InputError(
            "one fine-tune is given for the batch and one for each row", fix="give one of both"
        )
    for name, array in batch.items():
        if array.ndim and len(array) != len(deltas):
            raise InputError(
                f"{len(deltas)} fine-tunes for {len(array)} rows of {name}",
                fix="give a fine-tune for each row of the batch",
            )


def _key(path: Path) -> Any:
    """What tells one file from another, and from itself before it was rewritten."""
    try:
        return digest_cache.key(path)
    except OSError:
        return None  # `load` says what is wrong
