"""List every variant in which a kernel is launched, so that all can be compiled ahead of time.

A variant names its kernel, the types of its arguments and its constants. Kernels are launched
through it, so what is compiled without a GPU is what runs on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import triton
import triton.language as tl

from kilodelta.files.dtypes import PRECISIONS
from kilodelta.merging.gpu import add, draw, mix

TILE = 128
"""Entries of a factor, or lines of it, that a program draws."""

LINES = 32
"""Lines of RandLoRA's factors that a program draws, 32 columns at a time."""

WIDTH = 128
"""The width of RandLoRA's factors is rounded up to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel with its constants; `types` are Triton's names by argument."""

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    aligned: tuple[str, ...] = field(default=())
    """Integer arguments that are multiples of 16."""

    def launch(self, grid: tuple[int, ...], *arguments: Any) -> None:
        """Run on the current stream.

        Args:
            grid: programs along each axis.
            arguments: in the kernel's order, without the constants.
        """
        self.kernel[grid](
            *arguments, **self.constants, num_warps=self.warps, num_stages=self.stages
        )

    def compile(self, capability: int) -> Any:
        """Compile for a compute capability such as 89; no GPU is needed.

        Raises:
            Exception: of any class, from the compiler or the assembler.
        """
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = self.kernel.arg_names
        types = {name: self.types.get(name, "constexpr") for name in names}
        even = [n for n in names if types[n].startswith("*") or n in self.aligned]
        source = ASTSource(
            fn=self.kernel,
            signature=types,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
        )
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _types(pointers: str, integers: str, **others: str) -> Mapping[str, str]:
    """Make argument types: of `name:type` for pointers, of names for int32."""
    types = {n: "*" + t for n, t in (item.split(":") for item in pointers.split())}
    return MappingProxyType({**types, **dict.fromkeys(integers.split(), "i32"), **others})


_PLACE = "k0 k1 role first lines rank"
BITS = MappingProxyType({row.name: f"i{row.bits}" for row in PRECISIONS.values()})
"""The integer type that holds a weight's bits."""

MIXED = {
    rows: Variant(
        name=f"mixed-{'rows' if rows else 'columns'}",
        kernel=draw.mixed,
        types=_types("out:i32 planes:i32 flips:i32", f"total {_PLACE} blocks bits"),
        constants={"ROWS": rows, "TILE": TILE},
    )
    for rows in (True, False)
}

SIGNED = {
    rows: Variant(
        name=f"signed-{'rows' if rows else 'columns'}",
        kernel=draw.signed,
        types=_types("out:i32 over_rank:i32 over_lines:i32", _PLACE),
        constants={"ROWS": rows, "TILE": TILE},
    )
    for rows in (True, False)
}

PICKED = {
    (rows, anchored): Variant(
        name=f"picked-{'rows' if rows else 'columns'}{'-anchored' if anchored else ''}",
        kernel=draw.picked,
        types=_types("out:i32 theta:i32", f"k anchor anchor_role index {_PLACE}"),
        constants={"ROWS": rows, "ANCHORED": anchored, "TILE": TILE},
    )
    for rows, anchored in ((True, False), (False, False), (False, True))
}

LARGE = {
    ternary: Variant(
        name=f"large-{'ternary' if ternary else 'sign'}",
        kernel=draw.large,
        types=_types("out:i8 lambda_:i8", f"edge top n width {_PLACE}"),
        constants={"TERNARY": ternary, "TILE": LINES},
        aligned=("width",),
    )
    for ternary in (False, True)
}

SMALL = {
    ternary: Variant(
        name=f"small-{'ternary' if ternary else 'sign'}",
        kernel=draw.small,
        types=_types("out:i8 gamma:i8", "k0 k1 role first edge top lines all_lines n width"),
        constants={"TERNARY": ternary, "TILE": LINES},
        aligned=("width",),
    )
    for ternary in (False, True)
}

LOW_RANK = {
    (dtype, wide): Variant(
        name=f"low_rank-{dtype}{'-wide' if wide else ''}",
        kernel=add.low_rank,
        types=_types(
            f"weights:{bits} out:{bits} flag:i32 left:i32 right:i32",
            "rows columns rank c",
            scale="fp32",
        ),
        constants={"DTYPE": dtype, "WIDE": wide, "BM": 32, "BN": 128},
        aligned=("columns",),
    )
    for dtype, bits in BITS.items()
    for wide in (False, True)
}

BY_INT8 = {
    dtype: Variant(
        name=f"by_int8-{dtype}",
        kernel=add.by_int8,
        types=_types(
            f"weights:{bits} out:{bits} flag:i32 left:i8 right:i8",
            "rows columns width c",
            scale="fp32",
        ),
        constants={"DTYPE": dtype, "BM": 128, "BN": 128, "BK": WIDTH, "GROUP": 8},
        warps=8,
        aligned=("columns", "width"),
    )
    for dtype, bits in BITS.items()
}

_TRAINED = "k0 k1 role targets largest rank blocks"
FORWARD = {
    (rows, name): Variant(
        name=f"forward-{'rows' if rows else 'columns'}-{name}",
        kernel=mix.forward,
        types=_types(f"out:{name} coefficients:{name} starts:i64 sizes:i32", _TRAINED),
        constants={"ROWS": rows, "TYPE": type_, "BT": tile, "BE": tile},
    )
    for rows in (True, False)
    for name, type_, tile in (("fp32", tl.float32, 64), ("fp64", tl.float64, 32))
}

BACKWARD = {
    (rows, name): Variant(
        name=f"backward-{'rows' if rows else 'columns'}-{name}",
        kernel=mix.backward,
        types=_types(f"out:{name} gradient:{name} starts:i64 sizes:i32", f"step {_TRAINED}"),
        constants={"ROWS": rows, "TYPE": type_, "BT": 32, "BE": tile},
    )
    for rows in (True, False)
    for name, type_, tile in (("fp32", tl.float32, 64), ("fp64", tl.float64, 32))
}

ALL: tuple[Variant, ...] = tuple(
    variant
    for table in (
        MIXED, SIGNED, PICKED, LARGE, SMALL, LOW_RANK, BY_INT8, FORWARD, BACKWARD,
    )
    for variant in table.values()
)  # fmt: skip
"""Every variant."""
