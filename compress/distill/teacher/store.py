"""Keep the teacher's outputs row by row: in memory, or in a folder that later runs read again.

A folder holds `teacher.json`, which names every fact that the outputs depend on, and parts: flat
float32 arrays of some rows each, written in full or not at all. A run that was stopped goes on with
the rows that no part holds. A part whose bytes are not the ones that were written is computed anew.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kilodelta.errors import InputError, OutputError
from kilodelta.files import plain, staging
from kilodelta.files.staging import Need, require_room

VERSION = 1
INDEX = "teacher.json"
PART = 32 << 20
"""Bytes of outputs from which they are written as a part."""

Row = Mapping[str, Tensor]
"""One row's outputs by name, (...)."""
Facts = Mapping[str, str]
"""What outputs depend on: in words, with values or digests."""


class Store(Protocol):
    """Rows of outputs, filled once and then read."""

    def missing(self) -> list[int]:
        """List the rows that are still to be computed."""

    def add(self, rows: Mapping[int, Row]) -> None:
        """Take up the outputs of some rows."""

    def close(self) -> None:
        """Write what is not written yet."""

    def row(self, index: int) -> Row:
        """Return a row's outputs."""


class MemoryStore:
    """Rows in memory."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._rows: dict[int, Row] = {}

    def missing(self) -> list[int]:
        return [index for index in range(self._count) if index not in self._rows]

    def add(self, rows: Mapping[int, Row]) -> None:
        self._rows |= {i: {n: v.clone() for n, v in row.items()} for i, row in rows.items()}

    def close(self) -> None:
        """Do nothing: there is nothing to write."""

    def row(self, index: int) -> Row:
        return self._rows[index]


class DiskStore:
    """Rows in a folder of parts, which are mapped and not read into memory.

    Args:
        folder: made where it is missing.
        facts: what the outputs depend on.
        count: rows in all.

    Raises:
        InputError: the folder holds the outputs of another model or of other inputs.
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, facts: Facts, count: int) -> None:
        self.folder, self._facts, self._count = folder, dict(facts), count
        self._places: dict[int, dict[str, Tensor]] = {}
        self._parts: list[dict[str, Any]] = []
        self._waiting: dict[int, Row] = {}
        self.damaged = 0
        """Parts that were not what was written, and are computed anew."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise OutputError(
                f"the teacher's outputs cannot be kept in {folder}: {problem.strerror}",
                fix="give another folder with --teacher-cache",
            ) from None
        self.reopen()

    def reopen(self) -> None:
        """Take up the parts that the folder lists now: another process may have written them."""
        self._parts, self._places = [], {}
        for part in _read_index(self.folder, self._facts):
            self._take(part)

    def missing(self) -> list[int]:
        return [i for i in range(self._count) if i not in self._places and i not in self._waiting]

    def add(self, rows: Mapping[int, Row]) -> None:
        self._waiting |= rows
        if sum(v.nbytes for row in self._waiting.values() for v in row.values()) >= PART:
            self.close()

    def close(self) -> None:
        if not self._waiting:
            return
        rows, self._waiting = self._waiting, {}
        part = _write_part(self.folder, rows)
        self._parts.append(part)
        text = {"version": VERSION, "facts": self._facts, "parts": self._parts}
        staging.write(self.folder / INDEX, json.dumps(text, indent=1).encode())
        self._map(part)

    def row(self, index: int) -> Row:
        return self._places[index]

    def _take(self, part: Any) -> None:
        """Use a part that an earlier run wrote, unless it is damaged."""
        try:
            if plain.sha256(self.folder / _name(part["file"])).hex() != part["sha256"]:
                raise ValueError("other bytes")
            self._map(part)
        except Exception:  # torch, zipfile and a JSON of any shape raise unrelated classes
            self.damaged += 1
        else:
            self._parts.append(part)

    def _map(self, part: Mapping[str, Any]) -> None:
        flat = torch.load(self.folder / part["file"], mmap=True, weights_only=True)
        rows: list[dict[str, Tensor]] = [{} for _ in part["rows"]]
        for name, shapes in part["shapes"].items():
            pieces = flat[name].split([math.prod(shape) for shape in shapes])
            for row, piece, shape in zip(rows, pieces, shapes, strict=True):
                row[name] = piece.view(shape)
        self._places |= dict(zip(part["rows"], rows, strict=True))


def _write_part(folder: Path, rows: Mapping[int, Row]) -> dict[str, Any]:
    """Write some rows as one file; return what the index says about it."""
    indices = sorted(rows)
    names = list(rows[indices[0]])
    flat = {name: torch.cat([rows[i][name].reshape(-1) for i in indices]) for name in names}
    place = folder / f"rows-{indices[0]}-{len(indices)}.pt"
    with staging.new_file(place) as stage:
        torch.save(flat, stage)
    return {
        "file": place.name,
        "rows": indices,
        "shapes": {name: [list(rows[i][name].shape) for i in indices] for name in names},
        "sha256": plain.sha256(place).hex(),
    }


def _read_index(folder: Path, facts: Facts) -> Iterable[Any]:
    """Return the parts that a folder lists, none where it is new or its index is damaged."""
    try:
        index = json.loads(plain.read(folder / INDEX, plain.INDEX_LIMIT))
        version, other, parts = index["version"], index["facts"], list(index["parts"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()
    if not isinstance(other, dict):
        return ()
    differing = [key for key in {**other, **facts} if other.get(key) != facts.get(key)]
    if differing or version != VERSION:
        raise InputError(
            f"{folder} holds the teacher's outputs of another run: {', '.join(differing)}",
            fix="give another folder with --teacher-cache, or remove this one",
        )
    return parts


def _name(value: Any) -> str:
    """Return a file's name, which leads nowhere out of the folder."""
    if not isinstance(value, str) or "/" in value or "\\" in value:
        raise ValueError("no file name")
    return value


def folder_of(cache: Path, facts: Facts) -> Path:
    """Return the folder below a cache for outputs of these facts.

    Example:
        >>> folder_of(Path("cache"), {"base": "a"}).parts[0]
        'cache'
    """
    text = json.dumps(dict(facts), sort_keys=True)
    return cache / hashlib.sha256(text.encode()).hexdigest()[:24]


def require_disk(folder: Path, needed: int, beside: Sequence[Need] = ()) -> None:
    """Check that a disk has room, before any work.

    Args:
        folder: where files are to lie; it need not exist.
        needed: bytes.
        beside: what else the run writes, perhaps on the same disk.

    Raises:
        OutputError: it has less, or the folder is read-only.
    """
    outputs = Need(path=folder / INDEX, nbytes=needed, what="the teacher's outputs")
    require_room(
        *((outputs, *beside) if needed else ()),
        fix="give a folder on a larger disk that you may write to with --teacher-cache, fewer"
        " inputs with --limit, or shorter ones with --max-length",
    )


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Put rows together, (rows, ...), zeros where one is shorter than the longest.

    Example:
        >>> padded([torch.ones(1), torch.ones(2)]).tolist()
        [[1.0, 0.0], [1.0, 1.0]]
    """
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    out = parts[0].new_zeros([len(parts), *shape])
    for row, part in zip(out, parts, strict=True):
        row[tuple(slice(0, size) for size in part.shape)] = part
    return out
