"""Read a `.kd` file into a `Delta`."""

from __future__ import annotations

import os
from pathlib import Path

from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format import container
from kilodelta.format.delta import Delta


def load(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | Checkpoint | None = None,
    *,
    max_work: float | None = None,
) -> Delta:
    """Read a `.kd` file and check every rule of the format.

    Args:
        path: the file; it stays mapped as long as the delta lives.
        base: the model that it was made for; with it the delta is bound (see `Delta.bind`).
        max_work: the most operations that its expansion may take, wherever it is bound; by default
            as many as suit the base's size (`kilodelta.format.cost`).

    Raises:
        FileError: the file breaks a rule, a bit of it has changed, or its update costs too much.
        BaseMismatchError: the targets do not fit `base`.

    Example:
        >>> load("tests/golden/0.1.0/nola-8.kd").manifest.count
        4
    """
    manifest, tensors = container.read(Path(path))
    delta = Delta(
        manifest=manifest,
        blob=tensors[container.COEFFICIENTS].data,
        extras=container.without_prefix(tensors, container.EXTRA),
        probes=container.without_prefix(tensors, container.PROBE),
        max_work=max_work,
    )
    return delta if base is None else delta.bind(base)
