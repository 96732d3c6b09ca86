"""`bundle.json` and `base/tensors.json`: what a device folder is; written once, never trusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from kilodelta.errors import DeviceError
from kilodelta.export.manifest.facts import DTYPES, FLAVOURS, FileFact
from kilodelta.files import canonical, dtypes, plain, staging, untrusted
from kilodelta.files.identity import Identity, of_digests
from kilodelta.files.tensor import TensorInfo
from kilodelta.files.untrusted import FieldError
from kilodelta.verify.parity.gate import Limit

VERSION = 2
MODES = ("adapter", "patch", "refit")
RUNTIMES = ("onnxruntime-cpu", "onnxruntime-cuda", *FLAVOURS)

MAX_JUMP = 1_000_000
"""By how much a version may exceed the highest one before it, unless the bundle says otherwise."""

CEILINGS: Mapping[str, float] = MappingProxyType({"float32": 0.01, "float16": 0.1, "bfloat16": 0.5})
"""The most that a file's own probe may allow an output to be off, by precision.

Limits are four times the error of plain torch, which is a hundredth of these at most; outputs of
an unrelated model are off by more than 1.
"""

MAX_KEEP = 1000
_LIMIT = 1 << 20
TENSORS_LIMIT = 64 << 20
"""Bytes that are read; a row of tensors.json takes about 150."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What a device folder is.

    Attributes:
        mode: how fine-tunes are applied: "adapter", "patch" or "refit".
        dtype: the precision of weights and arithmetic, such as "float32".
        runtime: what computes: one of `RUNTIMES`.
        base_name, base_root: the base's name, for messages, and its digest.
        files: those in `base/`.
        limits: by output, how far this base may be from the golden outputs.
        ceiling: the most that the limits stated by a `.kd` file's probe may be.
        max_jump: how far a version may exceed the highest one that was served.
        keep: fine-tunes that stay on the disk to go back to.
        max_work: the most operations that a `.kd` file may ask for; None: what suits the base.
        tool: what made the folder.
    """

    mode: str
    dtype: str
    runtime: str
    base_name: str
    base_root: str
    files: tuple[FileFact, ...]
    limits: Mapping[str, Limit]
    ceiling: float
    max_jump: int = MAX_JUMP
    keep: int = 1
    max_work: float | None = None
    tool: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "version": VERSION,
            "mode": self.mode,
            "dtype": self.dtype,
            "runtime": self.runtime,
            "base": {"name": self.base_name, "root": self.base_root},
            "files": [asdict(file) for file in self.files],
            "limits": {name: asdict(limit) for name, limit in self.limits.items()},
            "ceiling": self.ceiling,
            "max_jump": self.max_jump,
            "keep": self.keep,
            "tool": self.tool,
            # Only where it is set: releases before it refuse keys that they do not know.
            **({} if self.max_work is None else {"max_work": self.max_work}),
        }


@dataclass(frozen=True)
class BaseTensors:
    """What the base's tensors are, without their values: enough to bind a delta to it."""

    infos: tuple[TensorInfo, ...]
    digests: Mapping[str, str]

    @cached_property
    def identity(self) -> Identity:
        """The base's digests and root."""
        return of_digests(self.digests)


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Write `bundle.json`, in full or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    text = json.dumps(bundle.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    staging.write(path, text.encode() + b"\n")


def read_bundle(path: Path) -> Bundle:
    """Read `bundle.json`, of this version or of version 1, which lacks `ceiling` and `max_jump`.

    Raises:
        DeviceError: names what is wrong with it.
    """
    return read_json(path, _LIMIT, _bundle)


def write_tensors(path: Path, infos: Mapping[str, TensorInfo], identity: Identity) -> None:
    """Write `base/tensors.json`: name, dtype, shape and digest of every tensor.

    Raises:
        OutputError: it cannot be written.
    """
    rows = [[n, infos[n].dtype, list(infos[n].shape), d] for n, d in identity.tensors.items()]
    staging.write(path, canonical.dumps(rows).encode())


def read_tensors(path: Path) -> BaseTensors:
    """Read `base/tensors.json`.

    Raises:
        DeviceError: names what is wrong with it.
    """
    return read_json(path, TENSORS_LIMIT, _tensors)


def read_json(path: Path, limit: int, parse: Callable[[Any], T]) -> T:
    """Read a JSON file of a device folder that its bundle brought, trusting nothing.

    Args:
        path: the file.
        limit: bytes that it may have.
        parse: checks the parsed JSON, raises FieldError, and returns what it says.

    Raises:
        DeviceError: it cannot be read, or `parse` refuses it.
    """
    try:
        return parse(canonical.loads(plain.read(path, limit)))
    except OSError as problem:
        what = f"{path} {problem.strerror or problem}"
    except (canonical.NotCanonicalError, FieldError) as problem:
        what = f"{path} is wrong: {problem}"
    raise DeviceError(what, fix="copy the bundle to the device again")


_KEYS = {"version", "mode", "dtype", "runtime", "base", "files", "limits", "keep", "tool"}


def _bundle(value: Any) -> Bundle:
    version = untrusted.mapping(value, "bundle").get("version")
    if type(version) is not int or version not in (1, VERSION):
        raise FieldError(f"version is {version!r:.40}; this kilodelta reads 1 and {VERSION}")
    newer = {"ceiling", "max_jump"} if version > 1 else set()
    table = untrusted.table(value, "bundle", _KEYS | newer, {"max_work"} if newer else ())
    base = untrusted.table(table["base"], "base", {"name", "root"})
    dtype = untrusted.choice(table["dtype"], "dtype", DTYPES)
    limits = untrusted.mapping(table["limits"], "limits")
    return Bundle(
        mode=untrusted.choice(table["mode"], "mode", MODES),
        dtype=dtype,
        runtime=untrusted.choice(table["runtime"], "runtime", RUNTIMES),
        base_name=untrusted.text(base["name"], "base.name"),
        base_root=untrusted.digest(base["root"], "base.root"),
        files=untrusted.listed(table["files"], "files", file_of),
        limits={name: _limit(item, f"limits.{name:.80}") for name, item in limits.items()},
        ceiling=_number(table.get("ceiling", CEILINGS[dtype]), "ceiling"),
        max_jump=untrusted.whole(table.get("max_jump", MAX_JUMP), "max_jump"),
        keep=untrusted.whole(table["keep"], "keep"),
        max_work=_number(table["max_work"], "max_work") if "max_work" in table else None,
        tool=untrusted.text(table["tool"], "tool"),
    )


def file_of(value: Any, where: str) -> FileFact:
    """Check a file's name, digest and size from JSON.

    Raises:
        FieldError: names the field that is wrong.
    """
    table = untrusted.table(value, where, {"file", "sha256", "nbytes"})
    return FileFact(
        file=untrusted.file_name(table["file"], f"{where}.file"),
        sha256=untrusted.digest(table["sha256"], f"{where}.sha256"),
        nbytes=untrusted.whole(table["nbytes"], f"{where}.nbytes"),
    )


def _limit(value: Any, where: str) -> Limit:
    table = untrusted.table(value, where, {"relative_l2", "relative_max"})
    return Limit(**{name: _number(item, f"{where}.{name}") for name, item in table.items()})


def _number(value: Any, where: str) -> float:
    # Compared as it is: an integer may be too large for a float.
    if type(value) not in (int, float) or not 0 <= value < 1e300:
        raise FieldError(f"{where} is {str(value)[:40]}, not a number from 0 to 1e300")
    return float(value)


def _tensors(value: Any) -> BaseTensors:
    rows = untrusted.listed(value, "tensors", _row)
    return BaseTensors(
        tuple(info for info, _ in rows), {info.name: digest for info, digest in rows}
    )


def _row(value: Any, where: str) -> tuple[TensorInfo, str]:
    if not isinstance(value, list) or len(value) != 4:
        raise FieldError(f"{where} is not [name, dtype, shape, digest]")
    info = TensorInfo(
        name=untrusted.text(value[0], f"{where} name"),
        dtype=untrusted.choice(value[1], f"{where} dtype", dtypes.DTYPES),
        shape=untrusted.shape(value[2], f"{where} shape"),
    )
    return info, untrusted.digest(value[3], f"{where} digest")
