"""The manifest: everything a `.kd` file says about itself, checked field by field.

docs/format.md, section 3.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from types import MappingProxyType
from typing import Any

from kilodelta.errors import FileError
from kilodelta.format import canonical
from kilodelta.format.checkpoint import in_name_order
from kilodelta.format.coefficients import BITS, Scale
from kilodelta.format.methods import METHODS, Method, RandLora
from kilodelta.format.targets import Patterns

VERSION = 1
MAX_RANK = 4096
MAX_BASES = 1 << 24
MAX_TARGETS = 1 << 20
MAX_PATTERNS = 256
MAX_TEXT = 1024

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_SEED = re.compile(r"(?:0|[1-9][0-9]{0,19})\Z")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that a delta was made for.

    `fingerprints` (optional) holds two bytes a tensor in name order, the first byte of the name's
    SHA-256 and of the tensor's digest: enough to name what differs in a wrong base.
    """

    name: str
    root: str
    tensors: int
    fingerprints: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a file says about itself; `scales` in file order: shared groups, then each target's."""

    base: Base
    method: Method
    seed: int
    patterns: Patterns
    count: int
    bits: int
    scales: tuple[Scale, ...]
    extras: tuple[str, ...]
    result: str
    made: Mapping[str, str | int | float | bool] = field(
        default_factory=lambda: MappingProxyType({})
    )

    def text(self) -> str:
        """The canonical JSON."""
        return canonical.dumps(_to_json(self))


def _to_json(manifest: Manifest) -> dict[str, Any]:
    base = manifest.base
    printed = {"fingerprints": _base64(base.fingerprints)} if base.fingerprints else {}
    patterns = manifest.patterns
    return {
        "version": VERSION,
        "base": {"name": base.name, "root": base.root, "tensors": base.tensors, **printed},
        "method": method_options(manifest.method),
        "seed": str(manifest.seed),
        "targets": {
            "include": list(patterns.include),
            "exclude": list(patterns.exclude),
            "transposed": list(patterns.transposed),
            "count": manifest.count,
        },
        "coefficients": {"bits": manifest.bits, "scales": _base64(_scale_bytes(manifest.scales))},
        "extras": list(manifest.extras),
        "result": {"root": manifest.result},
        "made": dict(manifest.made),
    }


def method_options(method: Method) -> dict[str, str | int]:
    """A method as the manifest writes it; `sparsity` only with ternary bases."""
    options = {option.name: getattr(method, option.name) for option in fields(method)}  # type: ignore[arg-type]
    if options.get("basis") == "sign":
        options.pop("sparsity", None)
    return {"name": method.name, **options}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _scale_bytes(scales: tuple[Scale, ...]) -> bytes:
    return b"".join(bytes((scale.c, scale.e & 0xFF)) for scale in scales)


def fault(what: str) -> FileError:
    """The error of a manifest that breaks a rule."""
    return FileError(
        f"the manifest is wrong: {what}",
        fix="the file is damaged or not written by kilodelta: fetch it again",
    )


def parse(text: str) -> Manifest:
    """Read a manifest, trusting nothing.

    Raises:
        FileError: naming the field that breaks a rule.
    """
    try:
        table = canonical.loads(text.encode("utf-8"))
    except canonical.NotCanonicalError as problem:
        raise fault(f"it is not JSON: {problem}") from None
    if not isinstance(table, dict):
        raise fault("it is not an object")
    if table.get("version") != VERSION or table["version"] is True:
        raise FileError(
            f"the file has version {table.get('version')!r:.40}; this kilodelta reads {VERSION}",
            fix="pip install --upgrade kilodelta",
        )
    top = _keys(table, "manifest", _TOP)
    if canonical.dumps(table) != text:
        raise fault("it is not in canonical form")
    return _parse_fields(top)


_TOP = {
    "version", "base", "method", "seed", "targets", "coefficients", "extras", "result", "made"
}  # fmt: skip


def _parse_fields(top: dict[str, Any]) -> Manifest:
    targets = _keys(top["targets"], "targets", {"include", "exclude", "transposed", "count"})
    coefficients = _keys(top["coefficients"], "coefficients", {"bits", "scales"})
    method = _method(top["method"])
    bits = coefficients["bits"]
    if type(bits) is not int or bits not in BITS:
        raise fault(f"coefficients.bits is {bits!r:.40}, not one of {BITS}")
    if isinstance(method, RandLora) and bits > 8:
        raise fault("randlora takes coefficients of 4 or 8 bits")
    return Manifest(
        base=_base(top["base"]),
        method=method,
        seed=_seed(top["seed"]),
        patterns=Patterns(
            **{k: _globs(targets[k], k) for k in ("include", "exclude", "transposed")}
        ),
        count=_whole(targets["count"], "targets.count", 1, MAX_TARGETS),
        bits=bits,
        scales=_scales(coefficients["scales"]),
        extras=_extras(top["extras"]),
        result=_digest(_keys(top["result"], "result", {"root"})["root"], "result.root"),
        made=_made(top["made"]),
    )


def _keys(value: Any, where: str, names: set[str], optional: set[str] | None = None) -> Any:
    if not isinstance(value, dict):
        raise fault(f"{where} is not an object")
    if unknown := sorted(set(value) - names - (optional or set())):
        raise fault(f"{where} has an unknown key {unknown[0]!r:.80}")
    if missing := sorted(names - set(value)):
        raise fault(f"{where} lacks {missing[0]!r}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise fault(f"{where} is not a text of at most {MAX_TEXT} characters")
    return value


def _whole(value: Any, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise fault(f"{where} is {value!r:.40}, not a whole number from {low} to {high}")
    return value


def _digest(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _DIGEST.match(value):
        raise fault(f"{where} is not sha256:<64 hexadecimal digits>")
    return value


def _seed(value: Any) -> int:
    if not isinstance(value, str) or not _SEED.match(value) or int(value) >= 1 << 64:
        raise fault("seed is not a 64-bit integer as a decimal text")
    return int(value)


def _bytes(value: Any, where: str) -> bytes:
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except (binascii.Error, ValueError):
        data = None
    if data is None or _base64(data) != value:
        raise fault(f"{where} is not base64")
    return data


def _base(value: Any) -> Base:
    found = _keys(value, "base", {"name", "root", "tensors"}, {"fingerprints"})
    tensors = _whole(found["tensors"], "base.tensors", 1, 1 << 24)
    printed = b""
    if "fingerprints" in found:
        printed = _bytes(found["fingerprints"], "base.fingerprints")
        if len(printed) != 2 * tensors:
            raise fault(f"base.fingerprints has {len(printed)} bytes, not two a tensor")
    return Base(
        name=_text(found["name"], "base.name"),
        root=_digest(found["root"], "base.root"),
        tensors=tensors,
        fingerprints=printed,
    )


def _globs(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_PATTERNS:
        raise fault(f"targets.{where} is not a list of at most {MAX_PATTERNS} patterns")
    return tuple(_text(item, f"targets.{where}") for item in value)


def _scales(value: Any) -> tuple[Scale, ...]:
    data = _bytes(value, "coefficients.scales")
    if len(data) % 2 or 0 in data[::2]:
        raise fault("coefficients.scales is not pairs (c, e) with c from 1 to 255")
    return tuple(Scale(c, e - 256 if e > 127 else e) for c, e in zip(data[::2], data[1::2]))  # noqa: B905


def _extras(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise fault("extras is not a list of names")
    names = tuple(value)
    if in_name_order(set(names)) != names:
        raise fault("extras are not in name order, each once")
    return names


def _made(value: Any) -> Mapping[str, str | int | float | bool]:
    if not isinstance(value, dict):
        raise fault("made is not an object")
    for key, item in value.items():
        if not isinstance(item, (str, int, float, bool)):
            raise fault(f"made.{key:.80} is not a text, number or boolean")
        if isinstance(item, float) and not isfinite(item):
            raise fault(f"made.{key:.80} is not finite")
    return MappingProxyType(value)


def _method(value: Any) -> Method:
    if not isinstance(value, dict) or value.get("name") not in METHODS:
        name = value.get("name") if isinstance(value, dict) else value
        raise fault(f"method {name!r:.80} is unknown; known are {', '.join(METHODS)}")
    kind = METHODS[value["name"]]
    names = {option.name for option in fields(kind)}
    sparse = value.get("basis") == "ternary"
    if "sparsity" in names and not sparse:
        names.remove("sparsity")
    options = dict(_keys(value, "method", {"name", *names}))
    del options["name"]
    for name, item in options.items():
        _OPTIONS[name](item, kind.name)
    return kind(**options)


def _rank(value: Any, method: str) -> None:
    _whole(value, "method.rank", 1, MAX_RANK)


def _bases(value: Any, method: str) -> None:
    _whole(value, "method.bases", 1, MAX_BASES)


def _basis(value: Any, method: str) -> None:
    allowed = ("sign", "ternary") if method == RandLora.name else ("sign",)
    if value not in allowed:
        raise fault(f"method.basis is {value!r:.40}, not one of {allowed}")


def _sparsity(value: Any, method: str) -> None:
    _whole(value, "method.sparsity", 1, 1 << 20)


def _anchor(value: Any, method: str) -> None:
    _whole(value, "method.anchor", -32767, 32767)


_OPTIONS: Mapping[str, Callable[[Any, str], None]] = MappingProxyType(
    {
        "rank": _rank,
        "bases": _bases,
        "basis": _basis,
        "sparsity": _sparsity,
        "anchor": _anchor,
    }
)
