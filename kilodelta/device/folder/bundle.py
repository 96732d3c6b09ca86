"""`bundle.json` and `base/tensors.json`: what a device folder is, written once, never trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kilodelta.device.folder.places import Places
from kilodelta.errors import DeviceError, ProofError
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.manifest.facts import DTYPES, FLAVOURS, FileFact
from kilodelta.files import canonical, dtypes, staging, untrusted
from kilodelta.files.identity import Identity, of_digests
from kilodelta.files.tensor import TensorInfo
from kilodelta.verify.parity.gate import Limit

VERSION = 1
MODES = ("adapter", "patch", "refit")
RUNTIMES = ("onnxruntime-cpu", "onnxruntime-cuda", *FLAVOURS)
TENSORS = "tensors.json"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a device folder is.

    `files` are those in `base/`; `limits` say by output how far this base may be from the golden
    outputs; `keep` is the number of fine-tunes that stay on the disk to go back to.
    """

    mode: str
    dtype: str
    runtime: str
    name: str
    root: str
    files: tuple[FileFact, ...]
    limits: Mapping[str, Limit]
    keep: int = 1
    tool: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "mode": self.mode,
            "dtype": self.dtype,
            "runtime": self.runtime,
            "base": {"name": self.name, "root": self.root},
            "files": [asdict(file) for file in self.files],
            "limits": {name: asdict(limit) for name, limit in self.limits.items()},
            "keep": self.keep,
            "tool": self.tool,
        }


@dataclass(frozen=True)
class Tensors:
    """What the base's tensors are, without their values: enough to bind a delta to it."""

    infos: tuple[TensorInfo, ...]
    digests: Mapping[str, str]

    @cached_property
    def identity(self) -> Identity:
        return of_digests(self.digests)


def write(places: Places, bundle: Bundle) -> None:
    """Write `bundle.json`, in full or not at all."""
    text = json.dumps(bundle.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    staging.write(places.bundle, text.encode() + b"\n")


def read(places: Places) -> Bundle:
    """Read `bundle.json`.

    Raises:
        DeviceError: naming what is wrong with it.
    """
    return _read(places.bundle, _bundle)  # type: ignore[no-any-return]


def write_tensors(places: Places, infos: Mapping[str, TensorInfo], identity: Identity) -> None:
    """Write `base/tensors.json`: name, dtype, shape and digest of every tensor."""
    rows = [[n, infos[n].dtype, list(infos[n].shape), d] for n, d in identity.tensors.items()]
    staging.write(places.base / TENSORS, canonical.dumps(rows).encode())


def read_tensors(places: Places) -> Tensors:
    """Read `base/tensors.json`.

    Raises:
        DeviceError: naming what is wrong with it.
    """
    return _read(places.base / TENSORS, _tensors)  # type: ignore[no-any-return]


def check_files(folder: Path, files: tuple[FileFact, ...]) -> None:
    """See that files are there byte for byte, reading them all.

    Raises:
        ProofError: naming the first that is missing or changed.
    """
    for file in files:
        place = folder / file.file
        found = file_fact(place) if place.is_file() else None
        if found != file:
            raise ProofError(
                f"{place} is {f'{found.nbytes} bytes, {found.sha256}' if found else 'missing'}; "
                f"it was {file.nbytes} bytes, {file.sha256}",
                fix="apply the file again; for a file of base/ copy the bundle again",
            )


def _read(path: Path, parse: Any) -> Any:
    try:
        return parse(canonical.loads(path.read_bytes()))
    except (OSError, canonical.NotCanonicalError, untrusted.FieldError) as problem:
        raise DeviceError(
            f"{path} is wrong: {problem}", fix="copy the bundle to the device again"
        ) from None


_KEYS = {"version", "mode", "dtype", "runtime", "base", "files", "limits", "keep", "tool"}


def _bundle(value: Any) -> Bundle:
    found = untrusted.table(value, "bundle", _KEYS)
    if found["version"] != VERSION or found["version"] is True:
        raise untrusted.FieldError(
            f"version {found['version']!r:.40}; this kilodelta reads {VERSION}"
        )
    base = untrusted.table(found["base"], "base", {"name", "root"})
    limits = untrusted.mapping(found["limits"], "limits")
    return Bundle(
        mode=untrusted.choice(found["mode"], "mode", MODES),
        dtype=untrusted.choice(found["dtype"], "dtype", DTYPES),
        runtime=untrusted.choice(found["runtime"], "runtime", RUNTIMES),
        name=untrusted.text(base["name"], "base.name"),
        root=untrusted.digest(base["root"], "base.root"),
        files=untrusted.listed(found["files"], "files", file_of),
        limits={name: _limit(item, f"limits.{name:.80}") for name, item in limits.items()},
        keep=untrusted.whole(found["keep"], "keep"),
        tool=untrusted.text(found["tool"], "tool"),
    )


def file_of(value: Any, where: str) -> FileFact:
    """A file's name, digest and size from JSON."""
    found = untrusted.table(value, where, {"file", "sha256", "nbytes"})
    return FileFact(
        file=untrusted.file_name(found["file"], f"{where}.file"),
        sha256=untrusted.digest(found["sha256"], f"{where}.sha256"),
        nbytes=untrusted.whole(found["nbytes"], f"{where}.nbytes"),
    )


def _limit(value: Any, where: str) -> Limit:
    found = untrusted.table(value, where, {"relative_l2", "relative_max"})
    return Limit(**{name: _number(item, f"{where}.{name}") for name, item in found.items()})


def _number(value: Any, where: str) -> float:
    if type(value) not in (int, float) or value < 0:
        raise untrusted.FieldError(f"{where} is {value!r:.40}, not a number from 0 on")
    return float(value)


def _tensors(value: Any) -> Tensors:
    rows = untrusted.listed(value, "tensors", _row)
    return Tensors(tuple(info for info, _ in rows), {info.name: digest for info, digest in rows})


def _row(value: Any, where: str) -> tuple[TensorInfo, str]:
    if not isinstance(value, list) or len(value) != 4:
        raise untrusted.FieldError(f"{where} is not [name, dtype, shape, digest]")
    name = untrusted.text(value[0], f"{where} name")
    dtype = untrusted.choice(value[1], f"{where} dtype", dtypes.DTYPES)
    shape = untrusted.listed(value[2], f"{where} shape", untrusted.whole)
    info = TensorInfo(name=name, dtype=dtype, shape=shape)
    return info, untrusted.digest(value[3], f"{where} digest")
