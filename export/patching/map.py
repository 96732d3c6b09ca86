"""The map of an ONNX file: which bytes of it are which tensor of the base, and what proves it.

It is made once, where the base checkpoint is (`make_map.py`), and travels with the ONNX file as
JSON, read here field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kilodelta.errors import FileError
from kilodelta.export.manifest.facts import FileFact
from kilodelta.export.onnx.tensors import is_inside
from kilodelta.files import canonical, plain, staging, untrusted
from kilodelta.files.dtypes import DTYPES, nbytes
from kilodelta.files.floats import castable, lossless
from kilodelta.files.identity import of_digests
from kilodelta.files.tensor import TensorInfo
from kilodelta.files.untrusted import FieldError

VERSION = 1
LIMIT = 64 << 20
"""Bytes of a map that are read; MiniLM's takes 35 KB."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an ONNX file holds a base tensor.

    `name`, `dtype` and `shape` are the initializer's; `file` is relative to the model's folder;
    `transposed` says that it holds the matrix the other way round. `top` says that runtimes know
    it by its name, as an initializer of the main graph.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    transposed: bool
    top: bool

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


@dataclass(frozen=True, kw_only=True)
class PatchMap:
    """Which bytes of an ONNX file are which tensor of a base."""

    files: tuple[FileFact, ...]
    """The model itself, then its external data, by their names in its folder."""

    root: str
    """The base's."""

    tensors: Mapping[str, TensorInfo]
    """All tensors of the base."""

    digests: Mapping[str, str]
    """Theirs; `root` is over them."""

    places: Mapping[str, tuple[Place, ...]]
    """Base tensor to where it lies, more than once where an exporter copied it."""

    refused: Mapping[str, str]
    """Base tensors that the file does not hold as they are, and what became of them."""

    unused: tuple[str, ...] = ()
    """Base tensors that the model's outputs do not depend on."""

    def exact(self, name: str) -> Place | None:
        """A place from which a base tensor's own bytes can be read back, if there is one."""
        dtype = self.tensors[name].dtype
        return next((p for p in self.places.get(name, ()) if lossless(dtype, p.dtype)), None)


def write_map(found: PatchMap, path: str | Path) -> None:
    """Write a map as JSON, in full or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    text = canonical.dumps(_to_json(found))
    staging.write(Path(path), text.encode("utf-8"), b"\n")


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
            f"{path} is no map of an ONNX file: {problem}", fix="make it again, or fetch it again"
        ) from None


def _to_json(found: PatchMap) -> dict[str, Any]:
    return {
        "version": VERSION,
        "files": [asdict(file) for file in found.files],
        "base": {
            "root": found.root,
            "tensors": {
                name: [info.dtype, list(info.shape), found.digests[name]]
                for name, info in found.tensors.items()
            },
        },
        "places": {name: [asdict(place) for place in own] for name, own in found.places.items()},
        "refused": dict(found.refused),
        "unused": list(found.unused),
    }


def _parse(value: Any) -> PatchMap:
    found = untrusted.table(
        value, "the map", ("version", "files", "base", "places", "refused", "unused")
    )
    if found["version"] != VERSION or found["version"] is True:
        raise FieldError(f"version is {found['version']!r:.40}; this kilodelta reads {VERSION}")
    base = untrusted.table(found["base"], "base", ("root", "tensors"))
    rows = untrusted.mapping(base["tensors"], "base.tensors")
    known = {name: _tensor(row, f"base.tensors.{name}") for name, row in rows.items()}
    identity = of_digests({name: digest for name, (_, _, digest) in known.items()})
    if untrusted.digest(base["root"], "base.root") != identity.root:
        raise FieldError(f"base.root is {base['root']}, the tensors' digests give {identity.root}")
    files = untrusted.listed(found["files"], "files", _file)
    places = {
        name: untrusted.listed(own, f"places.{name}", _place)
        for name, own in untrusted.mapping(found["places"], "places").items()
    }
    _check_places(files, places, known)
    refused = untrusted.mapping(found["refused"], "refused")
    return PatchMap(
        files=files,
        root=identity.root,
        tensors={name: _info(name, known[name]) for name in identity.tensors},
        digests=identity.tensors,
        places=places,
        refused={name: untrusted.text(why, f"refused.{name}") for name, why in refused.items()},
        unused=untrusted.texts(found["unused"], "unused"),
    )


_Row = tuple[str, tuple[int, ...], str]


def _tensor(value: Any, where: str) -> _Row:
    if not isinstance(value, list) or len(value) != 3:
        raise FieldError(f"{where} is not [dtype, shape, digest]")
    dtype, shape, digest = value
    return _dtype(dtype, where), _shape(shape, where), untrusted.digest(digest, where)


def _info(name: str, row: _Row) -> TensorInfo:
    dtype, shape, _ = row
    return TensorInfo(name=name, dtype=dtype, shape=shape)


def _dtype(value: Any, where: str) -> str:
    return untrusted.choice(value, where, DTYPES)


def _shape(value: Any, where: str) -> tuple[int, ...]:
    return untrusted.listed(value, where, untrusted.whole)


def _file(value: Any, where: str) -> FileFact:
    found = untrusted.table(value, where, ("file", "sha256", "nbytes"))
    return FileFact(
        file=_inside(found["file"], where),
        sha256=untrusted.digest(found["sha256"], where),
        nbytes=untrusted.whole(found["nbytes"], where),
    )


def _inside(value: Any, where: str) -> str:
    if not is_inside(untrusted.text(value, where)):
        raise FieldError(f"{where} is {value!r:.80}, which leaves the folder")
    return str(value)


def _place(value: Any, where: str) -> Place:
    keys = ("name", "dtype", "shape", "file", "begin", "transposed", "top")
    found = untrusted.table(value, where, keys)
    return Place(
        name=untrusted.text(found["name"], where),
        dtype=_dtype(found["dtype"], where),
        shape=_shape(found["shape"], where),
        file=_inside(found["file"], where),
        begin=untrusted.whole(found["begin"], where),
        transposed=untrusted.flag(found["transposed"], where),
        top=untrusted.flag(found["top"], where),
    )


def _check_places(
    files: tuple[FileFact, ...],
    places: Mapping[str, tuple[Place, ...]],
    known: Mapping[str, _Row],
) -> None:
    """See that every place is of a tensor of the base, fits it, and lies in a file's bounds."""
    sizes = {file.file: file.nbytes for file in files}
    for name, own in places.items():
        if name not in known or not own:
            raise FieldError(f"places names {name!r:.80}, which the base or the file does not have")
        for place in own:
            if place.begin + place.nbytes > sizes.get(place.file, 0):
                raise FieldError(f"places.{name} ends beyond {place.file}")
            if not _fits(place, *known[name]):
                raise FieldError(f"places.{name} does not fit the base's tensor")


def _fits(place: Place, dtype: str, shape: tuple[int, ...], _digest: str) -> bool:
    if not castable(dtype, place.dtype):
        return False
    if place.transposed:
        return len(shape) == 2 and place.shape == shape[::-1]
    return nbytes("U8", place.shape) == nbytes("U8", shape)
