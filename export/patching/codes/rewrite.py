"""Merge a target in the grid of a quantised base, into every copy that a model file has of it.

The codes, scales and zero points are read from the file itself, and what is written is decoded
again; that decoding gives the digest which the `.kd` file promises.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING

from kilodelta.errors import CheckpointError, ExportError
from kilodelta.export.merge.in_grid import Tally, recoded
from kilodelta.export.patching.codes.places import REST, CodePlaces
from kilodelta.export.patching.map import FilePlace
from kilodelta.export.patching.strided import read_place
from kilodelta.files.tensor import Bytes, RawTensor
from kilodelta.grid.identity import matrix_digest
from kilodelta.grid.layouts import Parts
from kilodelta.grid.matrix import Matrix
from kilodelta.merging.in_grid import regridded

if TYPE_CHECKING:
    from kilodelta.export.patching.plan import PatchPlan

ALMOST_NOTHING = (
    "serve it beside the codes, from a device folder of adapter mode (its update is exact there),"
    " or compress anew with a larger update"
)
"""What to do where the grid takes almost nothing of an update."""


def place_codes(
    plan: PatchPlan, name: str, write: Callable[[FilePlace, Bytes], None], tally: Tally
) -> str:
    """Compute the new codes of a weight and call `write` with the bytes of each place.

    Args:
        plan: what changes where.
        name: a quantised target of the plan's delta.
        write: takes a place and its bytes, uint8 (n,).
        tally: counts what changes.

    Returns:
        the logical digest of what was written.

    Raises:
        CheckpointError: the weight cannot be read, or its copies have different scales.
        ProofError: what was packed does not decode to the new codes.
    """
    copies = plan.patch_map.codes[name]
    base = read_copy(plan, name, copies[0])
    new = regridded(plan.delta, plan.delta.target(name), base)
    tally.add(changed=new.changed, weights=base.codes.size, steps=new.steps, still=new.still)
    digests = set()
    for copy in copies:
        packed, written = recoded(name, copy.layout, _parts(plan, copy), new.matrix.codes)
        digests.add(matrix_digest(name, _in_blocks(written, name, copy, plan)))
        if copy.is_held:
            write(copy.codes, packed.data)
    if len(digests) > 1:
        raise CheckpointError(
            f"{name}: two copies of it in {plan.model.name} have different scales",
            fix="fetch the file and its map again",
        )
    return digests.pop()


def read_copy(plan: PatchPlan, name: str, copy: CodePlaces) -> Matrix:
    """Read a weight from one of its copies, in the base's own blocks.

    Raises:
        CheckpointError: the file cannot be read, or holds no such weight.
        ExportError: a part lies in the rest of the base, which was not given.
    """
    matrix = copy.layout.unpack(_parts(plan, copy)).checked(name)
    return _in_blocks(matrix, name, copy, plan)


def _in_blocks(matrix: Matrix, name: str, copy: CodePlaces, plan: PatchPlan) -> Matrix:
    whole = matrix.in_blocks(copy.block)
    if whole is None:
        raise CheckpointError(
            f"{name}: the scales in {plan.model.name} are not those of blocks of"
            f" {copy.block[0]} x {copy.block[1]}",
            fix="fetch the file and its map again",
        )
    return whole


def _parts(plan: PatchPlan, copy: CodePlaces) -> Parts:
    return {role: _part(plan, part) for role, part in copy.parts.items()}


def _part(plan: PatchPlan, part: FilePlace) -> RawTensor:
    if part.file != REST:
        data = read_place(plan.path(part.file), part)
        return RawTensor(dtype=part.dtype, shape=part.shape, data=data)
    if plan.rest is None or part.name not in plan.rest:
        raise ExportError(
            f"{part.name} is not in the {plan.patch_map.kind}, and the rest of the base lacks it",
            fix="give what `write_rest` wrote beside the map",
        )
    raw = plan.rest.raw(part.name)
    if (raw.dtype, prod(raw.shape)) != (part.dtype, prod(part.shape)):
        raise CheckpointError(
            f"{part.name} is {raw.dtype} {list(raw.shape)} in the rest of the base, not"
            f" {part.dtype} {list(part.shape)}",
            fix="fetch the rest of the base and the map again",
        )
    return RawTensor(dtype=raw.dtype, shape=part.shape, data=raw.data)
