"""Compute with a device folder: what is served now, or any other fine-tune for one request."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.folder.state import State
from kilodelta.device.modes import Mode, Session, open_mode
from kilodelta.device.request import check_request, read_known
from kilodelta.device.update import admit
from kilodelta.errors import InputError, KiloDeltaError
from kilodelta.files import npz
from kilodelta.files.source import file_key
from kilodelta.models.hub import locate_delta
from kilodelta.verify.runners.runner import Arrays

BASE = "base"
"""The name by which `run` takes the base itself."""

_ATTEMPTS = 5

Batch: TypeAlias = Mapping[str, NDArray[Any]]
File: TypeAlias = str | os.PathLike[str]


class Device:
    """A device folder opened for computing; threads may share it.

    An `apply` or `rollback` by another process is seen by the next call. What was read before goes
    on being used until then: nothing is ever changed in place.

    Args:
        folder: the device folder.

    Raises:
        DeviceError: no device folder, or a damaged one.
        MissingPackageError: the runtime is not installed.

    Example:
        >>> device = Device("device/")  # doctest: +SKIP
        >>> device.run({"input_ids": ids, "attention_mask": mask})["embedding"]  # doctest: +SKIP
        >>> device.run(batch, delta="other.kd")  # doctest: +SKIP
    """

    def __init__(self, folder: File) -> None:
        self.folder = DeviceFolder.open(folder)
        self._mode: Mode = open_mode(self.folder)
        self._sessions = _Sessions(self._mode.held)
        self._known = read_known(self.folder.base)

    @property
    def state(self) -> State:
        """What is served now, and what a rollback goes back to.

        Raises:
            DeviceError: it cannot be read.
        """
        return self.folder.state

    def run(
        self,
        batch: Batch,
        delta: File | None = None,
        *,
        deltas: Sequence[File | None] | None = None,
    ) -> Arrays:
        """Compute the outputs by name.

        Args:
            batch: the inputs by name. Their values must fit the model's types: token ids that are
                negative or no whole numbers are refused, never rounded. An input that the model
                lacks may hold zeros only.
            delta: a `.kd` file to compute this request with, or "base"; by default what is served.
            deltas: the same for each row of the batch, where the folder was bundled with slots.

        Raises:
            FileError, BaseMismatchError, InputError: the file is damaged, for another base, or of a
                kind that this folder's mode cannot take; or there are more fine-tunes than slots,
                or not as many as rows; or an input is missing, or does not fit the others.
            ProofError: the model does not take these inputs.
        """
        check_request(batch, self._known)
        if deltas is None:
            return self.session(delta).run(batch)
        _check_rows(batch, delta, deltas)
        return self._mode.mixed([self.session(one) for one in deltas]).run(batch)

    def session(self, delta: File | None = None) -> Session:
        """Return what `run` computes with; it stays the same fine-tune when others are applied.

        Raises:
            FileError, BaseMismatchError, InputError: as `run` does.
        """
        if delta is None:
            return self._served()
        if str(delta) == BASE:
            return self._sessions.get("", lambda: self._mode.open(None))
        path = Path(delta)
        try:
            key = file_key(path)
        except OSError:
            return self._trial(path)  # which says what is wrong with the path
        return self._sessions.get(key, lambda: self._trial(path))

    def _served(self) -> Session:
        """Return the current fine-tune's session.

        One that was removed while it was being opened is no longer the current one: look again.
        """
        for _ in range(_ATTEMPTS):
            name = self.state.serving.folder
            try:
                return self._sessions.get(name, lambda name=name: self._opened(name))  # type: ignore[misc]
            except (OSError, KiloDeltaError):
                if self.state.serving.folder == name:
                    raise
        raise KiloDeltaError(
            f"{self.folder.root} changes faster than it can be read",
            fix="wait until nothing is applied any more",
        )

    def _opened(self, name: str) -> Session:
        return self._mode.open(self.folder.fine_tune(name) if name else None)

    def _trial(self, path: Path) -> Session:
        from kilodelta.format.file import load

        return self._mode.trial(admit.bind(self.folder, load(path)))


class _Sessions:
    """Sessions by key. Each is made once, and while one is made all others can be had.

    Beyond `held`, the one that was not used for longest gives way; those that somebody computes
    with live on until they have finished.
    """

    def __init__(self, held: int) -> None:
        self._held = held
        self._lock = threading.Lock()
        # A session may take the memory of a model, so no more are made at once than are held.
        self._makers = threading.BoundedSemaphore(held)
        self._futures: OrderedDict[Hashable, Future[Session]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Session]) -> Session:
        """Return a key's session; of several callers at once one makes it, the others wait.

        Raises:
            Exception: what `make` raises, for all who waited; the next call makes it anew.
        """
        while True:
            with self._lock:
                future = self._futures.get(key)
                is_ours = future is None
                if future is None:
                    future = self._futures[key] = Future()
                self._futures.move_to_end(key)
            if is_ours:
                return self._made(key, future, make)
            try:
                return future.result()
            except CancelledError:  # its maker was interrupted, which is no business of ours
                continue

    def _made(self, key: Hashable, future: Future[Session], make: Callable[[], Session]) -> Session:
        try:
            with self._makers:
                session = make()
        except BaseException as problem:
            with self._lock:
                del self._futures[key]
            # All who wait get the error; an interrupt is the maker's alone, so the others retry.
            if isinstance(problem, Exception):
                future.set_exception(problem)
            else:
                future.cancel()
            raise
        future.set_result(session)
        self._trim()
        return session

    def _trim(self) -> None:
        with self._lock:
            # Only finished ones: of one that is dropped while it is made, a second would be made.
            done = [key for key, future in self._futures.items() if future.done()]
            for key in done[: max(0, len(self._futures) - self._held)]:
                del self._futures[key]


def run(
    folder: File,
    inputs: File | Batch,
    *,
    delta: Sequence[File] = (),
    out: File | None = None,
) -> Arrays:
    """Compute outputs with what a device folder serves; for many requests keep a `Device` open.

    Args:
        folder: the device folder.
        inputs: an `.npz` file, or arrays by name.
        delta: a `.kd` file for this request, or "base"; or one for each row of the inputs, where
            the folder was bundled with slots. What is served by default.
        out: an `.npz` file to write the outputs into as well.

    Raises:
        KiloDeltaError: as `Device` and `Device.run` do.
        OutputError: `out` cannot be written.

    Example:
        >>> run("device/", "inputs.npz", delta=["other.kd"])["logits"].shape  # doctest: +SKIP
        (8, 3)
    """
    batch = inputs if isinstance(inputs, Mapping) else npz.read_modest(inputs)
    delta = [one if str(one) == BASE else locate_delta(one) for one in delta]
    device = Device(folder)
    rows = delta if len(delta) > 1 else None
    outputs = device.run(batch, None if rows or not delta else delta[0], deltas=rows)
    if out is not None:
        npz.write_npz(out, outputs)
    return outputs


def _check_rows(batch: Batch, delta: Any, deltas: Sequence[Any]) -> None:
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
