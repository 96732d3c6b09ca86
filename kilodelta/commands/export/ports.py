"""One line for the inputs or outputs of a graph, a cache's layers taken together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kilodelta.export.manifest.facts import Port

_NUMBERED = re.compile(r"(.*?\.)(\d+)(\..+)")
"""What stands before a layer's number, the number, and what stands behind it."""


def describe_ports(ports: Iterable[Port]) -> str:
    """Name ports with their shapes, in order; those of many layers as one entry.

    Layers are taken together where their numbers follow one another and their shapes are equal:
    a decoder of 30 layers has 60 inputs for its cache alone.

    Example:
        >>> from kilodelta.export.manifest.facts import Port
        >>> cache = [
        ...     Port(name=f"past.{n}.{part}", dtype="float32", shape=("batch", 3, "past", 64))
        ...     for n in range(30)
        ...     for part in ("key", "value")
        ... ]
        >>> describe_ports([Port(name="ids", dtype="int64", shape=("batch",)), *cache])
        'ids [batch], past.0..29.key/value [batch, 3, past, 64]'
    """
    groups: dict[tuple[object, ...], list[tuple[Port, re.Match[str] | None]]] = {}
    for port in ports:
        match = _NUMBERED.fullmatch(port.name)
        key = (match[1], port.dtype, port.shape) if match else (port.name,)
        groups.setdefault(key, []).append((port, match))
    return ", ".join(part for members in groups.values() for part in _entries(members))


def _entries(members: list[tuple[Port, re.Match[str] | None]]) -> list[str]:
    """One entry if every part has the same unbroken run of layers, else one for each port."""
    layers: dict[str, list[int]] = {}
    for _, match in members:
        if match:
            layers.setdefault(match[3], []).append(int(match[2]))
    runs = list(layers.values())
    first, (port, match) = (runs[0][0] if runs else 0), members[0]
    unbroken = bool(runs) and runs[0] == list(range(first, first + len(runs[0])))
    if match is None or not unbroken or len(runs[0]) < 2 or any(run != runs[0] for run in runs):
        return [f"{port.name} {_shape(port)}" for port, _ in members]
    tails = "/".join(tail[1:] for tail in layers)
    return [f"{match[1]}{first}..{runs[0][-1]}.{tails} {_shape(port)}"]


def _shape(port: Port) -> str:
    return f"[{', '.join(map(str, port.shape))}]"
