"""Describe an ONNX file: which bytes of it are which tensor of a base, and what proves it.

The map is made once, where the base checkpoint is (`make_map.py`), and travels with the ONNX file
as JSON, read here field by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
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

VERSION = 2
"""Version 1 knew no heads; its maps are read."""
LIMIT = 64 << 20
"""Bytes of a map that are read; MiniLM's takes 35 KB."""


@dataclass(frozen=True, kw_only=True)
class OnnxPlace:
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
    """Which bytes of an ONNX file are which tensor of a base.

    Attributes:
        files: the model itself, then its external data, by their names in its folder.
        root: the base's.
        tensors: all tensors of the base.
        digests: theirs; `root` is over them.
        places: where the file holds a tensor, more than once where an exporter copied it.
        refused: tensors that the file does not hold as they are, and what became of them.
        heads: tensors of the file that the base lacks or holds in another shape, and that every
            fine-tune brings; `places` of their names are theirs.
        unused: tensors that the model's outputs do not depend on.
    """

    files: tuple[FileFact, ...]
    root: str
    tensors: Mapping[str, TensorInfo]
    digests: Mapping[str, str]
    places: Mapping[str, tuple[OnnxPlace, ...]]
    refused: Mapping[str, str]
    heads: Mapping[str, TensorInfo] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def info(self, name: str) -> TensorInfo | None:
        """Return what a tensor is in the file's architecture; None for one that is unknown."""
        return self.heads.get(name) or self.tensors.get(name)

    def exact(self, name: str) -> OnnxPlace | None:
        """Find a place from which a base tensor's own bytes can be read back, or None."""
        if name in self.heads:
            return None
        dtype = self.tensors[name].dtype
        return next((p for p in self.places.get(name, ()) if lossless(dtype, p.dtype)), None)


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
            f"{path} is no map of an ONNX file: {problem}", fix="make it again, or fetch it again"
        ) from None


def _to_json(patch_map: PatchMap) -> dict[str, Any]:
    return {
        "version": VERSION,
        "files": [asdict(file) for file in patch_map.files],
        "base": {
            "root": patch_map.root,
            "tensors": {
                name: [info.dtype, list(info.shape), patch_map.digests[name]]
                for name, info in patch_map.tensors.items()
            },
        },
        "places": {
            name: [asdict(place) for place in own] for name, own in patch_map.places.items()
        },
        "refused": dict(patch_map.refused),
        "heads": {name: [info.dtype, list(info.shape)] for name, info in patch_map.heads.items()},
        "unused": list(patch_map.unused),
    }


_KEYS = ("version", "files", "base", "places", "refused", "unused")


def _parse(value: Any) -> PatchMap:
    version = untrusted.mapping(value, "the map").get("version")
    if type(version) is not int or version not in (1, VERSION):
        raise FieldError(f"version is {version!r:.40}; this kilodelta reads {VERSION}")
    fields = untrusted.table(value, "the map", _KEYS if version == 1 else (*_KEYS, "heads"))
    base = untrusted.table(fields["base"], "base", ("root", "tensors"))
    rows = untrusted.mapping(base["tensors"], "base.tensors")
    known = {name: _tensor(row, f"base.tensors.{name}") for name, row in rows.items()}
    identity = of_digests({name: digest for name, (_, digest) in known.items()})
    if untrusted.digest(base["root"], "base.root") != identity.root:
        raise FieldError(f"base.root is {base['root']}, the tensors' digests give {identity.root}")
    files = untrusted.listed(fields["files"], "files", _file)
    places = {
        name: untrusted.listed(own, f"places.{name}", _place)
        for name, own in untrusted.mapping(fields["places"], "places").items()
    }
    tensors = {name: replace(known[name][0], name=name) for name in identity.tensors}
    heads = {
        name: replace(_head(row, f"heads.{name}"), name=name)
        for name, row in untrusted.mapping(fields.get("heads", {}), "heads").items()
    }
    _check_places(files, places, tensors | heads)
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
    return untrusted.listed(value, where, untrusted.whole)


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


def _place(value: Any, where: str) -> OnnxPlace:
    keys = ("name", "dtype", "shape", "file", "begin", "transposed", "top")
    fields = untrusted.table(value, where, keys)
    return OnnxPlace(
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
    places: Mapping[str, tuple[OnnxPlace, ...]],
    known: Mapping[str, TensorInfo],
) -> None:
    """See that every place is of a known tensor, fits it, and lies in a file's bounds."""
    sizes = {file.file: file.nbytes for file in files}
    for name, own in places.items():
        if name not in known or not own:
            raise FieldError(f"places names {name!r:.80}, which the base or the file does not have")
        for place in own:
            if place.begin + place.nbytes > sizes.get(place.file, 0):
                raise FieldError(f"places.{name} ends beyond {place.file}")
            if not _fits(place, known[name]):
                raise FieldError(f"places.{name} does not fit the base's tensor")


def _fits(place: OnnxPlace, info: TensorInfo) -> bool:
    if not castable(info.dtype, place.dtype):
        return False
    if place.transposed:
        return len(info.shape) == 2 and place.shape == info.shape[::-1]
    return prod(place.shape) == prod(info.shape)
