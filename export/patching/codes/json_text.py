"""Write the places of codes as the part of a map's JSON that only a quantised base has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from kilodelta.export.manifest.facts import FileFact
from kilodelta.export.patching.codes.places import REST, CodePlaces
from kilodelta.export.patching.map import FilePlace, PatchMap
from kilodelta.files import untrusted
from kilodelta.files.tensor import TensorInfo
from kilodelta.files.untrusted import FieldError
from kilodelta.grid.layouts import DequantizeLinear, Layout, MatMulNBits
from kilodelta.grid.matrix import Shape
from kilodelta.merging.outline import Outline, outline_to_json, parse_outline

CODE_KEYS = ("quantised", "codes")
"""The keys that a map of a quantised base has besides all others."""
TYPES = ("INT4", "UINT4", "INT8", "UINT8", "FLOAT8E4M3FN", "FLOAT4E2M1")
"""ONNX's types of codes whose bytes lie in one piece."""
_LAYOUTS: Mapping[str, type[Layout]] = {
    "MatMulNBits": MatMulNBits,
    "DequantizeLinear": DequantizeLinear,
}
_ROLES = {
    "MatMulNBits": ({"B", "scales"}, {"zero_points"}),
    "DequantizeLinear": ({"x", "x_scale"}, {"x_zero_point", "x_scale_scale"}),
}
Codes = Mapping[str, tuple[CodePlaces, ...]]


def codes_to_json(patch_map: PatchMap, place: Callable[[FilePlace], Any]) -> dict[str, Any]:
    """Return what `parse_codes` reads; nothing of a float base.

    Args:
        patch_map: the map.
        place: writes one place.
    """
    if patch_map.outline is None:
        return {}
    return {
        "quantised": outline_to_json(patch_map.outline),
        "codes": {
            name: [_copy_to_json(one, place) for one in own]
            for name, own in patch_map.codes.items()
        },
    }


def _copy_to_json(places: CodePlaces, place: Callable[[FilePlace], Any]) -> dict[str, Any]:
    layout = places.layout
    return {
        "operator": next(name for name, kind in _LAYOUTS.items() if type(layout) is kind),
        "layout": asdict(layout),
        "block": list(places.block),
        "parts": {role: place(part) for role, part in places.parts.items()},
    }


def parse_codes(
    given: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    files: tuple[FileFact, ...],
    place: Callable[[Any, str], FilePlace],
) -> tuple[Outline | None, Codes]:
    """Check the places of codes from JSON: each has to be of a quantised weight and in its file.

    Args:
        given: the map's keys; a map of a float base lacks `CODE_KEYS`.
        tensors: the base's stored tensors.
        files: the map's.
        place: checks one place.

    Raises:
        FieldError: names the field that is wrong.
    """
    if "quantised" not in given:
        return None, {}
    outline = parse_outline(given["quantised"], tensors)
    codes = {
        name: untrusted.listed(own, f"codes.{name}", lambda one, where: _copy(one, where, place))
        for name, own in untrusted.mapping(given["codes"], "codes").items()
    }
    sizes = {file.file: file.nbytes for file in files}
    for name, own in codes.items():
        if name not in outline.shapes or not own:
            raise FieldError(f"codes names {name!r:.80}, which is no quantised weight of the base")
        for copy in own:
            if copy.layout.shape != outline.shapes[name]:
                raise FieldError(f"codes.{name} does not fit the base's weight")
            for part in copy.parts.values():
                if part.file != REST and part.begin + part.span > sizes.get(part.file, 0):
                    raise FieldError(f"codes.{name} ends beyond {part.file}")
    return outline, codes


def _copy(value: Any, where: str, place: Callable[[Any, str], FilePlace]) -> CodePlaces:
    given = untrusted.table(value, where, ("operator", "layout", "block", "parts"))
    operator = untrusted.choice(given["operator"], f"{where}.operator", _LAYOUTS)
    needed, optional = _ROLES[operator]
    parts = untrusted.table(given["parts"], f"{where}.parts", needed, optional)
    return CodePlaces(
        layout=_layout(_LAYOUTS[operator], given["layout"], f"{where}.layout"),
        block=_pair(given["block"], f"{where}.block"),
        parts={role: _part(part, f"{where}.parts.{role}", place) for role, part in parts.items()},
    )


def _part(value: Any, where: str, place: Callable[[Any, str], FilePlace]) -> FilePlace:
    """Check a part, which the model or, with an empty file name, the rest of the base holds."""
    row = untrusted.mapping(value, where)
    if row.get("file") == REST:
        return replace(place({**row, "file": "rest"}, where), file=REST)
    return place(row, where)


def _layout(kind: type[Layout], value: Any, where: str) -> Layout:
    given = untrusted.table(value, where, [one.name for one in fields(kind)])
    checks: dict[str, Callable[[Any, str], Any]] = {
        "shape": _pair,
        "block": _pair,
        "bits": lambda bits, where: untrusted.whole(bits, where, 1, 8),
        "group": lambda group, where: untrusted.whole(group, where, 1, 1 << 31),
        "type": lambda type_, where: untrusted.choice(type_, where, TYPES),
        "transposed": untrusted.flag,
    }
    return kind(**{name: checks[name](item, f"{where}.{name}") for name, item in given.items()})


def _pair(value: Any, where: str) -> Shape:
    sizes = untrusted.shape(value, where)
    if len(sizes) != 2 or 0 in sizes:
        raise FieldError(f"{where} is not two sizes from 1 on")
    return sizes[0], sizes[1]
