"""Plan what a delta changes in an ONNX file or an engine: base bytes, tuned bytes and places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kilodelta.errors import BaseMismatchError, ExportError
from kilodelta.export.merge.tensor import changed_names, merged_parts
from kilodelta.export.patching.map import FilePlace, PatchMap
from kilodelta.export.patching.strided import read_place
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.floats import cast, castable, transposed
from kilodelta.files.tensor import TensorInfo
from kilodelta.format.delta import Delta

if TYPE_CHECKING:
    from kilodelta.merging.cpu import ByteSource

Bytes = npt.NDArray[np.uint8]

SHOWN = 5
"""Tensors named in one error."""


@dataclass(frozen=True, kw_only=True)
class PatchPlan:
    """A bound delta, the file it changes, and the checkpoint for what the file does not hold."""

    model: Path
    patch_map: PatchMap
    delta: Delta
    rest: Checkpoint | None

    def path(self, file: str) -> Path:
        """Return the path of one of the map's files; the model itself may have been renamed."""
        return self.model if file == self.patch_map.files[0].file else self.model.parent / file

    def places(self, name: str) -> tuple[FilePlace, ...]:
        """Return where the file holds a tensor, or the codes of a quantised weight; nothing where
        no output depends on it."""
        if name in self.patch_map.codes:
            return tuple(one.codes for one in self.patch_map.codes[name] if one.is_held)
        return self.patch_map.places.get(name, ())

    def tuned_info(self, name: str) -> TensorInfo:
        """Describe a changed tensor as the fine-tune has it."""
        extra = self.delta.extras.get(name)
        return self.patch_map.tensors[name] if extra is None else extra.info(name)

    def size(self, name: str) -> int:
        """Return the bytes of a changed tensor, in the base's dtype or as the delta stores it; of
        a quantised weight one for each code."""
        if name in self.patch_map.codes:
            return prod(self.delta.target(name).shape)
        return self.tuned_info(name).nbytes

    def parts(self, name: str) -> Iterator[Bytes]:
        """Compute a changed tensor's bytes from the base's, in order, whole rows at a time.

        A part is overwritten by the next one.

        Raises:
            CheckpointError: the base tensor cannot be read, or holds NaN or infinity.
        """
        if name in self.delta.extras:
            yield self.delta.extras[name].data
        else:
            yield from merged_parts(self.delta, name, self._base(name))

    def _base(self, name: str) -> ByteSource:
        place = self.patch_map.exact(name)
        if place is None:
            assert self.rest is not None  # `make_plan` has seen to it
            return self.rest.tensor(name)
        data = read_place(self.path(place.file), place)
        plain = transposed(data, place.shape) if place.transposed else data
        return cast(plain, place.dtype, self.patch_map.tensors[name].dtype)


def make_plan(
    model: Path, delta: Delta, patch_map: PatchMap, base: str | Path | Checkpoint | None
) -> PatchPlan:
    """See that a delta can be written into an ONNX file or an engine.

    Args:
        model: the base's ONNX file or engine.
        delta: bound to its base or not.
        patch_map: the file's map.
        base: the base checkpoint, or a part of it, for what the file does not hold exactly.

    Raises:
        BaseMismatchError: the file was exported from another base.
        ExportError: a tensor was fused, merged or folded, or has no place; the file takes a head
            that the delta does not bring; or the file holds a target rounded and `base` lacks it.
    """
    _require_base(model, delta, patch_map)
    bound = delta if delta.layout is not None else delta.bind_to(patch_map.changeable)
    rest = None if base is None else Checkpoint.open(base)
    plan = PatchPlan(model=model, patch_map=patch_map, delta=bound, rest=rest)
    names = changed_names(bound)
    _refuse(plan, [f"{n}: {why}" for n in names if (why := _no_place(plan, n))], "has no place")
    misfits = [f"{n}: {why}" for n in bound.extras if (why := _misfit(plan, n))]
    _refuse(plan, misfits, "does not fit", fix="" if patch_map.kind == "engine" else OF_THIS_SHAPE)
    _require_heads(plan)
    plain = [n for n in bound.tensors if n not in patch_map.codes]
    lacking = [n for n in plain if patch_map.exact(n) is None and n not in (rest or ())]
    _refuse(
        plan, lacking, "is not held exactly", fix="give the base checkpoint too, or `write_rest`'s"
    )
    return plan


def _require_base(model: Path, delta: Delta, patch_map: PatchMap) -> None:
    if patch_map.outline is not None:
        patch_map.outline.require(delta.manifest, str(model))
    elif delta.manifest.base.root != patch_map.root:
        raise BaseMismatchError(
            f"{model} holds another base: {patch_map.root}, not {delta.manifest.base.root}",
            fix=f"give the {patch_map.kind} of {delta.manifest.base.name or 'the base'}",
        )


WAY_OUT = "take a device folder in refit or adapter mode for it: kilodelta bundle --mode refit"
"""For what an engine cannot be patched with."""

OF_THIS_SHAPE = (
    "bundle or export the base with --config and a fine-tune of this shape; or bundle --mode"
    " adapter, where heads may differ in their number of labels"
)
"""For a graph whose tensors, such as a head's, have other shapes than a fine-tune's."""

WAY_OUT_OF_CODES = (
    "take a device folder in adapter mode, which leaves the codes alone: kilodelta bundle --mode"
    " adapter --engine; or patch the graph for ONNX Runtime: bundle --mode patch without --engine"
)
"""The same for an engine of a quantised base, of which TensorRT refits no codes."""


def _refuse(plan: PatchPlan, reasons: list[str], what: str, fix: str = "") -> None:
    if reasons:
        way_out = WAY_OUT if plan.patch_map.outline is None else WAY_OUT_OF_CODES
        is_engine = plan.patch_map.kind == "engine"
        listed = "\n  ".join(reasons[:SHOWN])
        more = f"\n  and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
        raise ExportError(
            f"what the delta changes {what} in the {plan.patch_map.kind}\n  {listed}{more}",
            fix=fix or (way_out if is_engine else "export the base with `kilodelta export`"),
        )


def _no_place(plan: PatchPlan, name: str) -> str:
    """Explain why a changed tensor cannot be written; empty if it can, or need not be."""
    patch_map = plan.patch_map
    if name in patch_map.codes and name in plan.delta.extras:
        return "it is stored as codes, and the file brings it whole"
    if name in patch_map.heads and name in plan.delta.tensors:
        return "the file was exported with a new head in its place"
    if patch_map.info(name) is None:
        return "the base has no tensor of that name, and the file was exported without it"
    if plan.places(name) or name in patch_map.unused:
        return ""
    return patch_map.refused.get(name, "the map does not know it")


def _misfit(plan: PatchPlan, name: str) -> str:
    extra, info = plan.delta.extras[name], plan.patch_map.info(name)
    if info is None or name in plan.patch_map.unused:
        return ""
    if extra.shape != info.shape:
        return f"its shape is {extra.shape}, the file's {info.shape}"
    for place in plan.places(name):
        if not castable(extra.dtype, place.dtype):
            return f"it is {extra.dtype}, the file's tensor {place.dtype}"
    return ""


def _require_heads(plan: PatchPlan) -> None:
    missing = [name for name in plan.patch_map.heads if name not in plan.delta.extras]
    if missing:
        raise ExportError(
            f"{plan.model.name} computes with a head that every file brings, and this one brings "
            f"no {', '.join(missing[:SHOWN])}",
            fix=f"give the {plan.patch_map.kind} of the base itself, or a device folder, made"
            " without --config",
        )
