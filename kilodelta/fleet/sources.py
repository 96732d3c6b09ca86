"""Digest what tasks read, and see that it is still what the plan was made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilodelta.errors import BaseMismatchError, InputError
from kilodelta.files import plain
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.model_digest import digest

MODELS = ("base", "tuned")
"""Keys of a task that hold a model's root, and parameters that hold its path."""
FILES = ("inputs", "labels", "delta")
"""Likewise of files and their digests."""


def require_unchanged(task: Mapping[str, Any]) -> None:
    """See that what a task reads is what the plan has hashed.

    Its id says so of the result for ever, so a file that was exchanged meanwhile must not get in.

    Args:
        task: a `Task` as JSON.

    Raises:
        BaseMismatchError: a model was exchanged, or this machine sees another one.
        CheckpointError: a model is missing.
        InputError: a `.kd` file, inputs or labels are missing or were changed.
    """
    for name in (*MODELS, *FILES):
        planned, path = _planned(task["key"].get(name)), task["params"].get(name)
        if not planned or path is None:
            continue
        is_model = name in MODELS
        now = digest(Checkpoint.open(Path(path))).root if is_model else file_digest(Path(path))
        if now != planned:
            error = BaseMismatchError if is_model else InputError
            raise error(
                f"{path} is {now}, the plan was made with {planned}",
                fix="run it again, which plans anew; on a cluster, see that all machines have it",
            )


def _planned(value: Any) -> str:
    """Return a digest that stands in a task's key; of a `.kd` file it stands under `file`."""
    if isinstance(value, Mapping):
        value = value.get("file")  # missing where a task of the same plan makes the file
    return value if isinstance(value, str) else ""


def file_digest(path: Path) -> str:
    """Return `sha256:` and the digest of a file, or of a folder's files and their names.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return plain.digest(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", fix="check the path") from None
