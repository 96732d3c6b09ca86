"""`adapter.json`: what lies beside a graph whose low-rank factors are inputs, and says which.

An exposed tensor W, stored as a matrix of (rows, columns), has two inputs, `<name>.lora_A` and
`<name>.lora_B`, whose product is added to what the graph makes of W:

- `turned`, where the graph uses W transposed (a linear layer): A (columns, rank), B (rank, rows);
- `straight`, where it uses W as stored (Conv1D, an embedding): A (rows, rank), B (rank, columns);
- `conv`, a convolution: A (rank, in, *kernel), B (rows, rank, 1...), two convolutions in a row;
- `unused`, where the outputs do not depend on it: no inputs, and a delta may change it freely.

With `slots`, each input has a first axis of slots + 1 fine-tunes, of which number 0 is the base,
and the input `adapter`, int64 (batch,), says which of them each row of a batch takes.

Neither torch nor onnx is needed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeAlias

from kilodelta.errors import FileError
from kilodelta.export.manifest.facts import DTYPES
from kilodelta.files import canonical, dtypes, staging, untrusted
from kilodelta.files.tensor import TensorInfo
from kilodelta.format.fields import MAX_RANK

VERSION = 1
NAME = "adapter.json"
MAX_SLOTS = 1024
INDEX = "adapter"
"""The input that chooses a slot for each row."""

Shape: TypeAlias = tuple[int, ...]
Use = Literal["turned", "straight", "conv", "unused"]
USES: tuple[Use, ...] = ("turned", "straight", "conv", "unused")


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
        """The shapes of A and B without the axis of slots."""
        rows, *others = self.info.shape
        columns = prod(others)
        if self.use == "turned":
            return (columns, rank), (rank, rows)
        if self.use == "straight":
            return (rows, rank), (rank, columns)
        return (rank, *others), (rows, rank, *[1] * (len(others) - 1))


@dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """What a graph exposes: the base it was made of, the rank, the tensors in name order.

    `dtype` is that of the factors; `optional` says that inputs left out are zeros.
    """

    base_name: str
    base_root: str
    rank: int
    slots: int
    dtype: str
    optional: bool
    exposed: tuple[Exposed, ...]

    @cached_property
    def inputs(self) -> Mapping[str, Shape]:
        """The factors' inputs by name, with their shapes, in the graph's order."""
        lead = (self.slots + 1,) if self.slots else ()
        return {
            name: (*lead, *shape)
            for tensor in self.exposed
            if tensor.use != "unused"
            for name, shape in zip(tensor.names, tensor.shapes(self.rank), strict=True)
        }

    def write(self, folder: Path) -> Path:
        """Write `adapter.json` into a folder, in full or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        text = json.dumps(_to_json(self), indent=1, ensure_ascii=False)
        staging.write(folder / NAME, text.encode("utf-8") + b"\n")
        return folder / NAME


def read_layout(folder: Path) -> AdapterLayout:
    """Read `adapter.json` from a folder, trusting nothing.

    Raises:
        FileError: it is missing, or a field of it is wrong; the message names the field.
    """
    place = folder / NAME
    try:
        return _parse(canonical.loads(place.read_bytes()))
    except (OSError, untrusted.FieldError, canonical.NotCanonicalError) as problem:
        raise FileError(
            f"{place} is wrong: {problem}",
            fix="export the graph with its adapter inputs again, or copy the folder again",
        ) from None


def _to_json(layout: AdapterLayout) -> dict[str, Any]:
    return {
        "version": VERSION,
        "base": {"name": layout.base_name, "root": layout.base_root},
        "rank": layout.rank,
        "slots": layout.slots,
        "dtype": layout.dtype,
        "optional": layout.optional,
        "exposed": [
            {
                "name": tensor.info.name,
                "dtype": tensor.info.dtype,
                "shape": list(tensor.info.shape),
                "use": tensor.use,
            }
            for tensor in layout.exposed
        ],
    }


_KEYS = ("version", "base", "rank", "slots", "dtype", "optional", "exposed")


def _parse(value: Any) -> AdapterLayout:
    top = untrusted.table(value, "the layout", _KEYS)
    if type(top["version"]) is not int or top["version"] != VERSION:
        raise untrusted.FieldError(
            f"version is {top['version']!r:.40}; this kilodelta reads {VERSION}"
        )
    base = untrusted.table(top["base"], "base", ("name", "root"))
    return AdapterLayout(
        base_name=untrusted.text(base["name"], "base.name"),
        base_root=untrusted.digest(base["root"], "base.root"),
        rank=_within(top["rank"], "rank", 1, MAX_RANK),
        slots=_within(top["slots"], "slots", 0, MAX_SLOTS),
        dtype=untrusted.choice(top["dtype"], "dtype", DTYPES),
        optional=untrusted.flag(top["optional"], "optional"),
        exposed=untrusted.listed(top["exposed"], "exposed", _exposed),
    )


def _within(value: Any, where: str, low: int, high: int) -> int:
    found = untrusted.whole(value, where)
    if not low <= found <= high:
        raise untrusted.FieldError(f"{where} is {found}, not from {low} to {high}")
    return found


def _exposed(value: Any, where: str) -> Exposed:
    row = untrusted.table(value, where, ("name", "dtype", "shape", "use"))
    dtype = untrusted.choice(row["dtype"], f"{where}.dtype", dtypes.TARGETS)
    shape = untrusted.listed(row["shape"], f"{where}.shape", untrusted.whole)
    if len(shape) < 2 or prod(shape) == 0:
        raise untrusted.FieldError(f"{where}.shape is {list(shape)}, not that of a matrix")
    name = untrusted.text(row["name"], f"{where}.name")
    info = TensorInfo(name=name, dtype=dtype, shape=shape)
    use = row["use"]
    untrusted.choice(use, f"{where}.use", USES)
    return Exposed(info=info, use=use)
