"""Results that are there in full or not at all: a temporary name, fsync, then rename."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from kilodelta.errors import OutputError


def temporary(path: Path) -> Path:
    """A hidden name beside `path` that nobody else uses."""
    return path.parent / f".{path.name}.{os.getpid()}.tmp"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file name that becomes `path` when the block ends well, and vanishes otherwise.

    Raises:
        OutputError: the folder is missing, not writable, or full.
    """
    stage = temporary(path)
    try:
        with _explained(path):
            yield stage
            sync(stage)
            os.replace(stage, path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the first error says what is wrong
            stage.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; `path` must not exist, or be an empty folder.

    Raises:
        OutputError: `path` holds something, or cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(f"{path} exists already", fix="give a new folder, or remove this one")
    stage = temporary(path)
    try:
        with _explained(path):
            stage.mkdir()
            yield stage
            for place in (*sorted(stage.rglob("*")), stage):
                sync(place)
            os.replace(stage, path)
            sync(path.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise OutputError(
            f"{path} cannot be written: {problem.strerror or problem}",
            fix="check the folder, its permissions and the free space",
        ) from problem


def sync(path: Path) -> None:
    """Push a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file in full or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with new_file(path) as stage, stage.open("wb") as file:
        for part in parts:
            file.write(part)
