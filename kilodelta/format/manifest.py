"""The manifest: everything a `.kd` file says about itself, checked field by field.

docs/format.md, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from types import MappingProxyType
from typing import Any

from kilodelta.errors import FileError
from kilodelta.files import canonical
from kilodelta.files.checkpoint import in_name_order
from kilodelta.format.coefficients import BITS, Scale
from kilodelta.format.fields import (
    choice,
    digest,
    fault,
    from_base64,
    keys,
    text,
    to_base64,
    whole,
)
from kilodelta.format.foreign import COMPAT, Compat
from kilodelta.format.methods import METHODS, Method, RandLora
from kilodelta.format.model_config import parse_config
from kilodelta.format.options import MAX_BASES as MAX_BASES
from kilodelta.format.options import method_options as method_options
from kilodelta.format.options import parse_method
from kilodelta.format.targets import Patterns

VERSION = 1
MAX_TARGETS = 1 << 20
MAX_PATTERNS = 256
FLOATS: Mapping[int, str] = MappingProxyType({32: "F32", 16: "F16"})
"""Types of a compatibility form's coefficients, by their bits."""

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
    method: Method | Compat
    seed: int
    patterns: Patterns
    count: int
    bits: int
    """Bits of an integer coefficient; of a float one, 32 or 16, in a compatibility form."""
    scales: tuple[Scale, ...]
    extras: tuple[str, ...]
    result: str
    made: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the fine-tune changed in the base's `config.json`; empty where nothing did."""

    @property
    def compat(self) -> Compat | None:
        """The compatibility form, where the method is one."""
        return None if self.method.name in METHODS else self.method  # type: ignore[return-value]

    def text(self) -> str:
        """The canonical JSON."""
        return canonical.dumps(_to_json(self))


def _to_json(manifest: Manifest) -> dict[str, Any]:
    base = manifest.base
    printed = {"fingerprints": to_base64(base.fingerprints)} if base.fingerprints else {}
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
        "coefficients": _coefficients_to_json(manifest),
        "extras": list(manifest.extras),
        "result": {"root": manifest.result},
        "made": dict(manifest.made),
        **({"config": dict(manifest.config)} if manifest.config else {}),
    }


def _coefficients_to_json(manifest: Manifest) -> dict[str, Any]:
    if manifest.compat is not None:
        return {"dtype": FLOATS[manifest.bits]}
    return {"bits": manifest.bits, "scales": to_base64(_scale_bytes(manifest.scales))}


def _scale_bytes(scales: tuple[Scale, ...]) -> bytes:
    return b"".join(bytes((scale.c, scale.e & 0xFF)) for scale in scales)


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
    top = keys(table, "manifest", _TOP, {"config"})
    if canonical.dumps(table) != text:
        raise fault("it is not in canonical form")
    return _parse_fields(top)


_TOP = {
    "version", "base", "method", "seed", "targets", "coefficients", "extras", "result", "made"
}  # fmt: skip


def _parse_fields(top: dict[str, Any]) -> Manifest:
    targets = keys(top["targets"], "targets", {"include", "exclude", "transposed", "count"})
    method = parse_method(top["method"])
    bits, scales = _coefficients(top["coefficients"], method)
    return Manifest(
        base=_base(top["base"]),
        method=method,
        seed=_seed(top["seed"]),
        patterns=Patterns(
            **{k: _globs(targets[k], k) for k in ("include", "exclude", "transposed")}
        ),
        count=whole(targets["count"], "targets.count", 1, MAX_TARGETS),
        bits=bits,
        scales=scales,
        extras=_extras(top["extras"]),
        result=digest(keys(top["result"], "result", {"root"})["root"], "result.root"),
        made=_made(top["made"]),
        config=parse_config(top["config"]) if "config" in top else {},
    )


def _seed(value: Any) -> int:
    if not isinstance(value, str) or not _SEED.match(value) or int(value) >= 1 << 64:
        raise fault("seed is not a 64-bit integer as a decimal text")
    return int(value)


def _base(value: Any) -> Base:
    found = keys(value, "base", {"name", "root", "tensors"}, {"fingerprints"})
    tensors = whole(found["tensors"], "base.tensors", 1, 1 << 24)
    printed = b""
    if "fingerprints" in found:
        printed = from_base64(found["fingerprints"], "base.fingerprints")
        if len(printed) != 2 * tensors:
            raise fault(f"base.fingerprints has {len(printed)} bytes, not two a tensor")
    return Base(
        name=text(found["name"], "base.name"),
        root=digest(found["root"], "base.root"),
        tensors=tensors,
        fingerprints=printed,
    )


def _globs(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_PATTERNS:
        raise fault(f"targets.{where} is not a list of at most {MAX_PATTERNS} patterns")
    return tuple(text(item, f"targets.{where}") for item in value)


def _coefficients(value: Any, method: Method | Compat) -> tuple[int, tuple[Scale, ...]]:
    """(bits, scales); floats have no scales."""
    if method.name in COMPAT:
        dtype = keys(value, "coefficients", {"dtype"})["dtype"]
        choice(dtype, "coefficients.dtype", tuple(FLOATS.values()))
        return next(bits for bits, name in FLOATS.items() if name == dtype), ()
    found = keys(value, "coefficients", {"bits", "scales"})
    bits = found["bits"]
    if type(bits) is not int or bits not in BITS:
        raise fault(f"coefficients.bits is {bits!r:.40}, not one of {BITS}")
    if isinstance(method, RandLora) and bits > 8:
        raise fault("randlora takes coefficients of 4 or 8 bits")
    return bits, _scales(found["scales"])


def _scales(value: Any) -> tuple[Scale, ...]:
    data = from_base64(value, "coefficients.scales")
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
    return value
