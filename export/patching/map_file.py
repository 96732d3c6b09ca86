"""Write the map of a model file as JSON, and read it back, trusting no field.

The base's root has to follow from its tensors' digests, and every place has to lie in its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

from kilodelta.errors import FileError
from kilodelta.export.manifest.facts import FileFact
from kilodelta.export.onnx.tensors import is_inside
from kilodelta.export.patching.codes.json_text import CODE_KEYS, codes_to_json, parse_codes
from kilodelta.export.patching.map import FilePlace, PatchMap, in_file
from kilodelta.files import canonical, plain, staging, untrusted
from kilodelta.files.dtypes import DTYPES
from kilodelta.files.floats import castable, lossless
from kilodelta.files.identity import of_digests
from kilodelta.files.tensor import TensorInfo
from kilodelta.files.untrusted import FieldError

VERSION = 4
"""Version 1 had no heads, version 2 no parts and no `through`, version 3 no codes of a quantised
base; maps of all are read. A map is written as the lowest version that can say it, so that older
devices take it."""
WITHOUT_PARTS, WITHOUT_CODES = 2, 3
LIMIT = 64 << 20
"""Bytes of a map that are read; MiniLM's takes 35 KB."""


def write_map(patch_map: PatchMap, path: str | Path) -> None:
    """Write a map as JSON, in full or not at all.

    Raises:
        OutputError: `path` exists, or cannot be written.
    """
    text = canonical.dumps(_to_json(patch_map)).encode("utf-8")
    with staging.new_file(Path(path), replace=False) as stage:
        stage.write_bytes(text + b"\n")


def read_map(path: str | Path) -> PatchMap:
    """Read a map, trusting nothing: the base's root has to follow from its tensors' digests.

    Raises:
        FileError: it is missing, or a field of it is wrong; the message names the field.
    """
    try:
        return _parse(canonical.loads(plain.read(Path(path), LIMIT, follow=True)))
    except OSError as problem:
        raise FileError(
            f"{path} cannot be read: {problem.strerror or problem}", fix="check the path"
        ) from None
    except (FieldError, canonical.NotCanonicalError) as problem:
        raise FileError(
            f"{path} is no map of a model's file: {problem}", fix="make it again, or fetch it again"
        ) from None


def _to_json(patch_map: PatchMap) -> dict[str, Any]:
    everything = (place for own in patch_map.places.values() for place in own)
    plain = patch_map.outline is None and all(place == _plain(place) for place in everything)
    version = WITHOUT_PARTS if plain else WITHOUT_CODES
    return {
        "version": version if patch_map.outline is None else VERSION,
        "files": [asdict(file) for file in patch_map.files],
        "base": {
            "root": patch_map.root,
            "tensors": {
                name: [info.dtype, list(info.shape), patch_map.digests[name]]
                for name, info in patch_map.tensors.items()
            },
        },
        "places": {
            name: [_place_json(place, plain=plain) for place in own]
            for name, own in patch_map.places.items()
        },
        "refused": dict(patch_map.refused),
        "heads": {name: [info.dtype, list(info.shape)] for name, info in patch_map.heads.items()},
        "unused": list(patch_map.unused),
        **codes_to_json(patch_map, lambda part: _place_json(part, plain=True)),
    }


def _plain(place: FilePlace) -> FilePlace:
    return replace(place, stride=0, first=0, through="")


def _place_json(place: FilePlace, *, plain: bool) -> dict[str, Any]:
    row = asdict(place)
    return {key: row[key] for key in (_PLACE_KEYS if plain else (*_PLACE_KEYS, *_PART_KEYS))}


_PLACE_KEYS = ("name", "dtype", "shape", "file", "begin", "transposed", "top")
_PART_KEYS = ("stride", "first", "through")
_KEYS = ("version", "files", "base", "places", "refused", "unused")


def _parse(value: Any) -> PatchMap:
    version = untrusted.mapping(value, "the map").get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise FieldError(f"version is {version!r:.40}; this kilodelta reads 1 to {VERSION}")
    keys = _KEYS if version == 1 else (*_KEYS, "heads")
    fields = untrusted.table(value, "the map", (*keys, *(CODE_KEYS if version == VERSION else ())))
    base = untrusted.table(fields["base"], "base", ("root", "tensors"))
    rows = untrusted.mapping(base["tensors"], "base.tensors")
    known = {name: _tensor(row, f"base.tensors.{name}") for name, row in rows.items()}
    identity = of_digests({name: digest for name, (_, digest) in known.items()})
    if untrusted.digest(base["root"], "base.root") != identity.root:
        raise FieldError(f"base.root is {base['root']}, the tensors' digests give {identity.root}")
    files = untrusted.listed(fields["files"], "files", _file)
    place = _part if version > WITHOUT_PARTS else _place
    places = {
        name: untrusted.listed(own, f"places.{name}", place)
        for name, own in untrusted.mapping(fields["places"], "places").items()
    }
    tensors = {name: replace(known[name][0], name=name) for name in identity.tensors}
    heads = {
        name: replace(_head(row, f"heads.{name}"), name=name)
        for name, row in untrusted.mapping(fields.get("heads", {}), "heads").items()
    }
    _check_places(files, places, tensors | heads)
    outline, codes = parse_codes(fields, tensors, files, _place)
    refused = untrusted.mapping(fields["refused"], "refused")
    return PatchMap(
        files=files,
        root=identity.root,
        tensors=tensors,
        digests=identity.tensors,
        places=places,
        refused={name: untrusted.text(why, f"refused.{name}") for name, why in refused.items()},
        heads=heads,
        unused=untrusted.texts(fields["unused"], "unused"),
        outline=outline,
        codes=codes,
    )


def _tensor(value: Any, where: str) -> tuple[TensorInfo, str]:
    if not isinstance(value, list) or len(value) != 3:
        raise FieldError(f"{where} is not [dtype, shape, digest]")
    return _info(value[0], value[1], where), untrusted.digest(value[2], where)


def _head(value: Any, where: str) -> TensorInfo:
    if not isinstance(value, list) or len(value) != 2:
        raise FieldError(f"{where} is not [dtype, shape]")
    return _info(value[0], value[1], where)


def _info(dtype: Any, shape: Any, where: str) -> TensorInfo:
    return TensorInfo(name="", dtype=_dtype(dtype, where), shape=_shape(shape, where))


def _dtype(value: Any, where: str) -> str:
    return untrusted.choice(value, where, DTYPES)


def _shape(value: Any, where: str) -> tuple[int, ...]:
    return untrusted.shape(value, where)


def _file(value: Any, where: str) -> FileFact:
    fields = untrusted.table(value, where, ("file", "sha256", "nbytes"))
    return FileFact(
        file=_inside(fields["file"], where),
        sha256=untrusted.digest(fields["sha256"], where),
        nbytes=untrusted.whole(fields["nbytes"], where),
    )


def _inside(value: Any, where: str) -> str:
    if not is_inside(untrusted.text(value, where)):
        raise FieldError(f"{where} is {value!r:.80}, which leaves the folder")
    return str(value)


def _place(value: Any, where: str) -> FilePlace:
    return _whole(untrusted.table(value, where, _PLACE_KEYS), where)


def _part(value: Any, where: str) -> FilePlace:
    fields = untrusted.table(value, where, (*_PLACE_KEYS, *_PART_KEYS))
    through = fields["through"]
    return replace(
        _whole(fields, where),
        stride=untrusted.whole(fields["stride"], where),
        first=untrusted.whole(fields["first"], where),
        through="" if through == "" else _dtype(through, where),
    )


def _whole(fields: Mapping[str, Any], where: str) -> FilePlace:
    return FilePlace(
        name=untrusted.text(fields["name"], where),
        dtype=_dtype(fields["dtype"], where),
        shape=_shape(fields["shape"], where),
        file=_inside(fields["file"], where),
        begin=untrusted.whole(fields["begin"], where),
        transposed=untrusted.flag(fields["transposed"], where),
        top=untrusted.flag(fields["top"], where),
    )


def _check_places(
    files: tuple[FileFact, ...],
    places: Mapping[str, tuple[FilePlace, ...]],
    known: Mapping[str, TensorInfo],
) -> None:
    """See that every place is of a known tensor, fits it, and lies in a file's bounds."""
    sizes = {file.file: file.nbytes for file in files}
    for name, own in places.items():
        if name not in known or not own:
            raise FieldError(f"places names {name!r:.80}, which the base or the file does not have")
        for place in own:
            if not _is_regular(place):
                raise FieldError(f"places.{name} has a stride that is none")
            if place.begin + place.span > sizes.get(place.file, 0):
                raise FieldError(f"places.{name} ends beyond {place.file}")
            if not _fits(place, known[name]):
                raise FieldError(f"places.{name} does not fit the base's tensor")


def _is_regular(place: FilePlace) -> bool:
    """Return whether a stride goes with rows that do not overlap, and columns with a stride."""
    if not place.stride:
        return place.first == 0
    return len(place.shape) == 2 and prod(place.shape) > 0 and place.stride >= place.row


def _fits(place: FilePlace, info: TensorInfo) -> bool:
    if not castable(info.dtype, place.dtype):
        return False
    if place.through and not lossless(place.through, place.dtype):
        return False
    if place.transposed and len(info.shape) != 2:
        return False
    if place.stride:
        rows, columns = in_file(info.shape, transposed=place.transposed)
        return place.shape[0] == rows and place.first + place.shape[1] <= columns
    if place.transposed:
        return place.shape == info.shape[::-1]
    return prod(place.shape) == prod(info.shape)
