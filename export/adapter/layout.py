"""Describe a graph whose low-rank factors are inputs: `adapter.json`, which lies beside it.

An exposed tensor W, stored as a matrix of (rows, columns), has two inputs, `<name>.lora_A` and
`<name>.lora_B`, whose product is added to what the graph computes with W:

- `turned`, where the graph uses W transposed (a linear layer): A (columns, rank), B (rank, rows);
- `straight`, where it uses W as stored (Conv1D, an embedding): A (rows, rank), B (rank, columns);
- `conv`, a convolution: A (rank, in, *kernel), B (rows, rank, 1...), two convolutions in a row;
- `stack`, matrices of several experts in one tensor (n, rows, columns), each with its own update:
  A (n, rows, rank), B (n, rank, columns);
- `unused`, where the outputs do not depend on it: no inputs, and a delta may change it freely.

A stored tensor, such as a new head's weight, is an input itself, under its own name; its values
where no fine-tune is served lie in `adapter.safetensors`.

With `slots`, each of these inputs has a first axis of slots + 1 fine-tunes, of which number 0 is
the base, and the input `adapter`, int64 (batch,), says which of them each row of a batch takes.

Neither torch nor onnx is needed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kilodelta.errors import CheckpointError, FileError
from kilodelta.export.manifest.facts import DTYPES
from kilodelta.files import canonical, dtypes, plain, safetensors, staging, untrusted
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import GRID, RawTensor, TensorInfo
from kilodelta.format.fields import MAX_RANK
from kilodelta.format.manifest import Grid, grid_to_json, parse_grid

VERSION = 3
"""Version 1 knew no stored tensors, version 2 no quantised base; layouts of both are read, and that
of a float base is written as version 2."""
FLOAT_VERSION = 2
NAME, VALUES = "adapter.json", "adapter.safetensors"
LIMIT = 64 << 20
"""Bytes of a layout that are read; MiniLM's takes 6 KB."""
MAX_SLOTS = 1024
INDEX = "adapter"
"""The input that chooses a slot for each row."""

Shape: TypeAlias = tuple[int, ...]
Use = Literal["turned", "straight", "conv", "stack", "unused"]
USES: tuple[Use, ...] = ("turned", "straight", "conv", "stack", "unused")


@dataclass(frozen=True, kw_only=True)
class Exposed:
    """A tensor of the base whose update is an input of the graph, and how the graph uses it."""

    info: TensorInfo
    use: Use

    @property
    def names(self) -> tuple[str, str]:
        """The names of its two inputs, A and B."""
        return f"{self.info.name}.lora_A", f"{self.info.name}.lora_B"

    def shapes(self, rank: int) -> tuple[Shape, Shape]:
        """Return the shapes of A and B without the axis of slots.

        Example:
            >>> info = TensorInfo(name="dense.weight", dtype="F32", shape=(24, 16))
            >>> Exposed(info=info, use="turned").shapes(4)
            ((16, 4), (4, 24))
        """
        rows, *others = self.info.shape
        columns = prod(others)
        if self.use == "turned":
            return (columns, rank), (rank, rows)
        if self.use == "straight":
            return (rows, rank), (rank, columns)
        if self.use == "stack":
            count, rows, columns = self.info.shape
            return (count, rows, rank), (count, rank, columns)
        return (rank, *others), (rows, rank, *[1] * (len(others) - 1))


@dataclass(frozen=True, kw_only=True)
class StoredInput:
    """A tensor that fine-tunes bring whole, and that is an input of the graph.

    Attributes:
        info: its name, dtype and shape in the architecture that was exported.
        is_new: the base lacks it, so each fine-tune has to bring it.
        is_free: its first axis, a head's labels, may have any length.
        is_used: the outputs depend on it; else it is no input, and a delta may bring anything.
    """

    info: TensorInfo
    is_new: bool
    is_free: bool
    is_used: bool

    def takes(self, shape: Shape) -> bool:
        """Return whether a tensor of this shape can be fed."""
        own = self.info.shape
        return shape == own or (self.is_free and len(shape) > 0 and shape[1:] == own[1:])


@dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """What a graph takes beside its model's own inputs.

    Attributes:
        base_name: of the base that the graph was made of, for messages.
        base_root: its root; fine-tunes of another base are refused.
        rank: the highest rank that the graph takes.
        slots: fine-tunes that one batch may mix; 0 for one at a time.
        dtype: of the factors and of floating stored tensors: float32, float16 or bfloat16.
        optional: inputs left out are zeros, or the values in `defaults`.
        exposed: tensors whose updates are inputs, in name order.
        stored: tensors that are inputs themselves, in name order.
        defaults: values of the stored tensors where no fine-tune is served, by name.
        grid: what the base is where it is quantised, else None; its weights are of dtype `GRID`.
    """

    base_name: str
    base_root: str
    rank: int
    slots: int
    dtype: str
    optional: bool
    exposed: tuple[Exposed, ...]
    stored: tuple[StoredInput, ...] = ()
    defaults: Mapping[str, RawTensor] = field(default_factory=dict, compare=False, repr=False)
    grid: Grid | None = None

    @cached_property
    def inputs(self) -> Mapping[str, Shape]:
        """The shapes of the factors' inputs by name, in the graph's order."""
        return {
            name: (*self.lead, *shape)
            for tensor in self.exposed
            if tensor.use != "unused"
            for name, shape in zip(tensor.names, tensor.shapes(self.rank), strict=True)
        }

    @property
    def lead(self) -> Shape:
        """The axis of slots, where there is one."""
        return (self.slots + 1,) if self.slots else ()

    def write(self, folder: Path) -> Path:
        """Write `adapter.json`, and `adapter.safetensors` where tensors are stored.

        Raises:
            OutputError: the folder cannot be written.
        """
        if self.defaults:
            safetensors.write(folder / VALUES, self.defaults)
        text = json.dumps(_to_json(self), indent=1, ensure_ascii=False)
        staging.write(folder / NAME, text.encode("utf-8") + b"\n")
        return folder / NAME


def read_layout(folder: Path) -> AdapterLayout:
    """Read the layout that lies in a folder, trusting nothing.

    Raises:
        FileError: a file is missing, or a field of it is wrong; the message names the field.
    """
    place = folder / NAME
    try:
        return _parse(canonical.loads(plain.read(place, LIMIT)), folder)
    except OSError as problem:
        raise FileError(f"{place} {problem.strerror or problem}", fix=_FIX) from None
    except (untrusted.FieldError, canonical.NotCanonicalError) as problem:
        raise FileError(f"{place} is wrong: {problem}", fix=_FIX) from None


_FIX = "export the graph with its adapter inputs again, or copy the folder again"


def _to_json(layout: AdapterLayout) -> dict[str, Any]:
    return {
        "version": FLOAT_VERSION if layout.grid is None else VERSION,
        **({} if layout.grid is None else {"grid": grid_to_json(layout.grid)}),
        "base": {"name": layout.base_name, "root": layout.base_root},
        "rank": layout.rank,
        "slots": layout.slots,
        "dtype": layout.dtype,
        "optional": layout.optional,
        "exposed": [{**_info_to_json(one.info), "use": one.use} for one in layout.exposed],
        "stored": [
            {
                **_info_to_json(one.info),
                "new": one.is_new,
                "free": one.is_free,
                "used": one.is_used,
            }
            for one in layout.stored
        ],
    }


def _info_to_json(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "dtype": info.dtype, "shape": list(info.shape)}


_KEYS = ("version", "base", "rank", "slots", "dtype", "optional", "exposed")


def _parse(value: Any, folder: Path) -> AdapterLayout:
    version = untrusted.mapping(value, "the layout").get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise untrusted.FieldError(
            f"version is {version!r:.40}; this kilodelta reads 1 to {VERSION}"
        )
    keys = _KEYS if version == 1 else (*_KEYS, "stored")
    top = untrusted.table(value, "the layout", (*keys, "grid") if version == VERSION else keys)
    base = untrusted.table(top["base"], "base", ("name", "root"))
    stored = untrusted.listed(top.get("stored", []), "stored", _stored)
    return AdapterLayout(
        base_name=untrusted.text(base["name"], "base.name"),
        base_root=untrusted.digest(base["root"], "base.root"),
        rank=_within(top["rank"], "rank", 1, MAX_RANK),
        slots=_within(top["slots"], "slots", 0, MAX_SLOTS),
        dtype=untrusted.choice(top["dtype"], "dtype", DTYPES),
        optional=untrusted.flag(top["optional"], "optional"),
        exposed=untrusted.listed(top["exposed"], "exposed", _exposed),
        stored=stored,
        defaults=_read_defaults(folder / VALUES, stored),
        grid=parse_grid(top["grid"]) if version == VERSION else None,
    )


def _within(value: Any, where: str, low: int, high: int) -> int:
    number = untrusted.whole(value, where)
    if not low <= number <= high:
        raise untrusted.FieldError(f"{where} is {number}, not from {low} to {high}")
    return number


def _exposed(value: Any, where: str) -> Exposed:
    row = untrusted.table(value, where, ("name", "dtype", "shape", "use"))
    info = _info(row, where, (*dtypes.TARGETS, GRID))
    if len(info.shape) < 2 or prod(info.shape) == 0:
        raise untrusted.FieldError(f"{where}.shape is {list(info.shape)}, not that of a matrix")
    use = row["use"]
    untrusted.choice(use, f"{where}.use", USES)
    if use == "stack" and len(info.shape) != 3:
        raise untrusted.FieldError(f"{where}.shape is {list(info.shape)}, not that of a stack")
    return Exposed(info=info, use=use)


def _stored(value: Any, where: str) -> StoredInput:
    row = untrusted.table(value, where, ("name", "dtype", "shape", "new", "free", "used"))
    return StoredInput(
        info=_info(row, where, dtypes.DTYPES),
        is_new=untrusted.flag(row["new"], f"{where}.new"),
        is_free=untrusted.flag(row["free"], f"{where}.free"),
        is_used=untrusted.flag(row["used"], f"{where}.used"),
    )


def _info(row: Mapping[str, Any], where: str, known: Any) -> TensorInfo:
    return TensorInfo(
        name=untrusted.text(row["name"], f"{where}.name"),
        dtype=untrusted.choice(row["dtype"], f"{where}.dtype", known),
        shape=untrusted.shape(row["shape"], f"{where}.shape"),
    )


def _read_defaults(path: Path, stored: tuple[StoredInput, ...]) -> dict[str, RawTensor]:
    """Read the values of the stored tensors, into memory of our own."""
    used = {one.info.name: one.info for one in stored if one.is_used}
    if not used:
        return {}
    try:
        source = Checkpoint.open(path)
    except CheckpointError as problem:
        raise FileError(problem.what, fix=_FIX) from None
    values = {name: source.raw(name) for name in source.names}
    if {name: raw.info(name) for name, raw in values.items()} != used:
        raise untrusted.FieldError(f"{VALUES} does not hold exactly the stored tensors")
    return {
        name: RawTensor(dtype=raw.dtype, shape=raw.shape, data=raw.data.copy())
        for name, raw in values.items()
    }
