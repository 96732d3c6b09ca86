"""Describe a file: what it is, what it needs, and where its bytes go. No base is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.files.checkpoint import in_name_order
from kilodelta.format.delta import Delta
from kilodelta.format.file import load

MEASURES = ("agreement", "codes_changed")
"""Keys of `made` that a dot and a precision may follow (docs/format.md, section 3)."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """A file at a glance; `nbytes` by part adds up to the file's size."""

    path: Path
    base: Mapping[str, str | int]
    method: Mapping[str, str | int]
    paper: str
    seed: int
    targets: Mapping[str, Any]
    bits: int
    """Of a coefficient: an integer, or a float where `exact` is false."""
    exact: bool
    """False for a compatibility form, whose basis is another tool's floats."""
    coefficients: int
    extras: Mapping[str, str]
    probes: Mapping[str, str]
    result: str
    made: Mapping[str, str | int | float | bool]
    config: Mapping[str, Any]
    """What the fine-tune changed in the base's `config.json`."""
    nbytes: Mapping[str, int]
    grid: Mapping[str, Any] | None = None
    """What the base is, where it is quantised: its roots, and its kinds of codes and blocks."""
    beside: str = ""
    """The root of the updates beside a quantised base."""

    @property
    def fidelity(self) -> Mapping[str, Mapping[str, str | int | float | bool]]:
        """What `made` says of each precision that the file was made for: `agreement` with the
        tuned model, and of a merge in the grid the share of `codes_changed`.

        Of a quantised base these are `in-grid` and `beside`; of a float one `fp16`, `int4-g32`,
        `int4-g32.beside`, ...
        """
        table: dict[str, dict[str, str | int | float | bool]] = {}
        for key, value in self.made.items():
            for measure in MEASURES:
                if key.startswith(f"{measure}."):
                    table.setdefault(key.removeprefix(f"{measure}."), {})[measure] = value
        if "in-grid" in table and "grid_codes_changed" in self.made:
            table["in-grid"]["codes_changed"] = self.made["grid_codes_changed"]
        return table

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        table = {name: _plain(value) for name, value in vars(self).items()}
        return {**table, "fidelity": _plain(self.fidelity)} if self.fidelity else table


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def inspect(path: str | os.PathLike[str]) -> Contents:
    """Read a `.kd` file, check it, and say what is in it.

    Raises:
        FileError: the file breaks a rule of the format.

    Example:
        >>> inspect("tests/golden/0.1.0/nola-8.kd").method
        {'name': 'nola', 'rank': 2, 'bases': 131, 'basis': 'sign'}
    """
    delta = load(path)
    manifest, place = delta.manifest, Path(path)
    patterns = manifest.patterns
    return Contents(
        path=place,
        base={
            "name": manifest.base.name,
            "root": manifest.base.root,
            "tensors": manifest.base.tensors,
        },
        method=manifest.method.to_manifest(),
        paper=manifest.method.paper,
        seed=manifest.seed,
        targets={
            "count": manifest.count,
            "include": patterns.include,
            "exclude": patterns.exclude,
            "transposed": patterns.transposed,
            **({"stacked": patterns.stacked} if patterns.stacked else {}),
        },
        bits=manifest.bits,
        exact=manifest.compat is None,
        coefficients=delta.blob.size * 8 // manifest.bits,
        extras=_kinds(delta.extras),
        probes=_kinds(delta.probes),
        result=manifest.result,
        made=manifest.made,
        config=manifest.config,
        nbytes=_parts(delta, place.stat().st_size),
        grid=None if manifest.grid is None else vars(manifest.grid),
        beside=manifest.beside,
    )


def _kinds(tensors: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: f"{tensors[name].dtype} {list(tensors[name].shape)}"
        for name in in_name_order(tensors)
    }


def _parts(delta: Delta, total: int) -> dict[str, int]:
    coefficients = int(delta.blob.size)
    extras = sum(int(tensor.data.size) for tensor in delta.extras.values())
    probes = sum(int(tensor.data.size) for tensor in delta.probes.values())
    return {
        "coefficients": coefficients,
        "extras": extras,
        "probes": probes,
        "header": total - coefficients - extras - probes,
        "file": total,
    }
