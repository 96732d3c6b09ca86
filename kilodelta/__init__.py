"""A fine-tuned model as base digest + seed + integer coefficients: kilobytes, merged back exactly.

A fine-tune's way, each step a function and the command of the same name (docs/python.md)::

    kilodelta.compress.compress("base/", "tuned/", "task.kd", inputs="texts.jsonl")
    kilodelta.merge("base/", "task.kd", "merged/")
    kilodelta.export.export("base/", "task.kd", "out/")
    kilodelta.verify.verify("base/", "task.kd", ["merged/", "out/"])
    kilodelta.device.apply("device/", "task.kd")

This module reads and merges `.kd` files without torch: `inspect`, `digest`, `load`, `merge`, with
the types `Delta` and `Checkpoint`. The rest lies in packages that load when they are first used:
`compress` makes files and `train` trains them in a loop of one's own, `export` uses them, `verify`
proves them, `device` serves them, `trust` signs them, `demo` shows all of it. Inside `dry_run` a
function checks everything and stops before it writes. All log to the logger `kilodelta`.

Example:
    >>> import kilodelta
    >>> file, base = "tests/golden/0.1.0/nola-8.kd", "tests/golden/0.1.0/base.safetensors"
    >>> kilodelta.inspect(file).method["name"]
    'nola'
    >>> delta = kilodelta.load(file, base=base)
    >>> delta.manifest.base.root == kilodelta.digest(base).root
    True
    >>> delta.expand("wide.weight").dtype
    dtype('int64')
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.export.merge.checkpoint import merge as merge
    from kilodelta.files.checkpoint import Checkpoint as Checkpoint
    from kilodelta.files.model_digest import digest as digest
    from kilodelta.format.delta import Delta as Delta
    from kilodelta.format.file import load as load
    from kilodelta.format.inspect import inspect as inspect
    from kilodelta.rehearsal import dry_run as dry_run

__version__ = "0.2.0"

_WHERE = {
    "Checkpoint": "kilodelta.files.checkpoint",
    "Delta": "kilodelta.format.delta",
    "digest": "kilodelta.files.model_digest",
    "dry_run": "kilodelta.rehearsal",
    "inspect": "kilodelta.format.inspect",
    "load": "kilodelta.format.file",
    "merge": "kilodelta.export.merge.checkpoint",
}
_PACKAGES = frozenset({"compress", "demo", "device", "export", "trust", "verify"})
_TRAIN = "train"

__all__ = ["Checkpoint", "Delta", "digest", "dry_run", "inspect", "load", "merge"]
_attribute, _names = lazy(__name__, _WHERE)


def __getattr__(name: str) -> Any:
    if name == _TRAIN:
        from kilodelta.errors import require

        require("torch", extra="torch", why="train a delta")
        return importlib.import_module("kilodelta.compress.training.train")
    if name in _PACKAGES:
        return importlib.import_module(f"kilodelta.{name}")
    return _attribute(name)


def __dir__() -> list[str]:
    """List the public names; `train` where torch is installed, so that `help` can look at all."""
    train = [_TRAIN] if importlib.util.find_spec("torch") is not None else []
    return sorted([*_names(), *_PACKAGES, *train, "__version__"])
