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
from kilodelta.files.untrusted import FieldError, choice, digest, table, text, whole
from kilodelta.format.fields import from_base64, to_base64
from kilodelta.format.foreign import Compat
from kilodelta.format.form import Form
from kilodelta.format.method_options import parse_method
from kilodelta.format.methods import Method
from kilodelta.format.model_config import parse_config
from kilodelta.format.packing import BITS
from kilodelta.format.quantise import Scale
from kilodelta.format.targets import Patterns

VERSION = 1
MAX_TARGETS = 1 << 20
MAX_PATTERNS = 256
FLOATS: Mapping[int, str] = MappingProxyType({32: "F32", 16: "F16"})
"""Types of a compatibility form's coefficients, by their bits."""

_SEED = re.compile(r"(?:0|[1-9][0-9]{0,19})\Z")


@dataclass(frozen=True, kw_only=True)
class Base:
    """The model that a delta was made for."""

    name: str
    root: str
    tensors: int
    fingerprints: bytes = b""
    """Two bytes per tensor in name order, the first byte of the name's SHA-256 and of the tensor's
    digest, or none: enough to name what differs in a wrong base."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a quantised base is, in any layout (docs/format.md, section 10)."""

    logical: str
    """Root over the quantised weights' logical digests."""
    grids: str
    """Root over their steps, zero points, minima, blocks and orders, without the codes."""
    plain: str
    """Root over all other tensors by value."""
    config: str
    """Digest of the quantisation configuration."""
    weights: int
    """How many weights are quantised."""
    kinds: tuple[str, ...]
    """What they are, such as `int4 1x32`: kind of code and block, sorted, each once."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that a file says about itself."""

    base: Base
    method: Form
    seed: int
    patterns: Patterns
    count: int
    """How many targets the patterns choose in the base."""
    bits: int
    """Bits of an integer coefficient; of a float one, 32 or 16, in a compatibility form."""
    scales: tuple[Scale, ...]
    """In file order: of the shared groups, then of each target's."""
    extras: tuple[str, ...]
    result: str
    made: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    """What the fine-tune changed in the base's `config.json`; empty where nothing did."""
    grid: Grid | None = None
    """The base's codes and scales, where it is quantised."""
    beside: str = ""
    """The root of the updates beside a quantised base; empty with any other."""

    @property
    def compat(self) -> Compat | None:
        """The compatibility form, where the method is one."""
        return self.method if isinstance(self.method, Compat) else None

    def text(self) -> str:
        """Return the canonical JSON."""
        return canonical.dumps(_to_json(self))


def _to_json(manifest: Manifest) -> dict[str, Any]:
    base, patterns, grid = manifest.base, manifest.patterns, manifest.grid
    prints = {"fingerprints": to_base64(base.fingerprints)} if base.fingerprints else {}
    return {
        "version": VERSION,
        "base": {"name": base.name, "root": base.root, "tensors": base.tensors, **prints},
        "method": manifest.method.to_manifest(),
        "seed": str(manifest.seed),
        "targets": {
            "include": list(patterns.include),
            "exclude": list(patterns.exclude),
            "transposed": list(patterns.transposed),
            **({"stacked": list(patterns.stacked)} if patterns.stacked else {}),
            "count": manifest.count,
        },
        "coefficients": _coefficients_to_json(manifest),
        "extras": list(manifest.extras),
        "result": {"root": manifest.result, **({"beside": manifest.beside} if grid else {})},
        "made": dict(manifest.made),
        **({"config": dict(manifest.config)} if manifest.config else {}),
        **({"grid": grid_to_json(grid)} if grid else {}),
    }


def grid_to_json(grid: Grid) -> dict[str, Any]:
    """Return what `parse_grid` reads."""
    return {**vars(grid), "kinds": list(grid.kinds)}


def _coefficients_to_json(manifest: Manifest) -> dict[str, Any]:
    if manifest.compat is not None:
        return {"dtype": FLOATS[manifest.bits]}
    pairs = b"".join(bytes((scale.c, scale.e & 0xFF)) for scale in manifest.scales)
    return {"bits": manifest.bits, "scales": to_base64(pairs)}


def parse(text: str) -> Manifest:
    """Read a manifest that nobody vouches for.

    Raises:
        FileError: naming the field that breaks a rule.
    """
    try:
        fields = canonical.loads(text.encode("utf-8"))
    except canonical.NotCanonicalError as problem:
        raise _fault(f"it is not JSON: {problem}") from None
    try:
        return _parse(fields, text)
    except FieldError as problem:
        raise _fault(str(problem)) from None


def _fault(what: str) -> FileError:
    return FileError(
        f"the manifest is wrong: {what}",
        fix="the file is damaged or not written by kilodelta: fetch it again",
    )


def _parse(fields: Any, text: str) -> Manifest:
    if not isinstance(fields, dict):
        raise FieldError("it is not an object")
    version = fields.get("version")
    if type(version) is not int or version != VERSION:
        raise FileError(
            f"the file has version {version!r:.40}; this kilodelta reads {VERSION}",
            fix="update kilodelta: git pull in its clone, then pip install .",
        )
    top = table(fields, "manifest", _TOP, optional=("config", "grid"))
    if canonical.dumps(fields) != text:
        raise FieldError("it is not in canonical form")
    method = parse_method(top["method"])
    patterns, count = _targets(top["targets"], method)
    bits, scales = _coefficients(top["coefficients"], method)
    grid = parse_grid(top["grid"]) if "grid" in top else None
    if grid and not isinstance(method, Method):
        raise FieldError(f"{method.name} is no exact method, so it has no result in a grid")
    result = table(top["result"], "result", ("root", "beside") if grid else ("root",))
    return Manifest(
        base=_base(top["base"]),
        method=method,
        seed=_seed(top["seed"]),
        patterns=patterns,
        count=count,
        bits=bits,
        scales=scales,
        extras=_extras(top["extras"]),
        result=digest(result["root"], "result.root"),
        made=_made(top["made"]),
        config=parse_config(top["config"]) if "config" in top else {},
        grid=grid,
        beside=digest(result["beside"], "result.beside") if grid else "",
    )


_TOP = (
    "version", "base", "method", "seed", "targets", "coefficients", "extras", "result", "made"
)  # fmt: skip


def _seed(value: Any) -> int:
    if not isinstance(value, str) or not _SEED.match(value) or int(value) >= 1 << 64:
        raise FieldError("seed is not a 64-bit integer as a decimal text")
    return int(value)


def _base(value: Any) -> Base:
    given = table(value, "base", ("name", "root", "tensors"), optional=("fingerprints",))
    tensors = whole(given["tensors"], "base.tensors", 1, 1 << 24)
    prints = b""
    if "fingerprints" in given:
        prints = from_base64(given["fingerprints"], "base.fingerprints")
        if len(prints) != 2 * tensors:
            raise FieldError(f"base.fingerprints has {len(prints)} bytes, not two per tensor")
    return Base(
        name=text(given["name"], "base.name"),
        root=digest(given["root"], "base.root"),
        tensors=tensors,
        fingerprints=prints,
    )


_KIND = re.compile(r"(?:int[1-8]|e2m1|e4m3) [1-9][0-9]{0,9}x[1-9][0-9]{0,9}\Z")


def parse_grid(value: Any) -> Grid:
    """Check what JSON says of a quantised base.

    Raises:
        FieldError: names the field that is wrong.
    """
    keys = ("logical", "grids", "plain", "config")
    given = table(value, "grid", (*keys, "weights", "kinds"))
    kinds = given["kinds"]
    if (
        not isinstance(kinds, list)
        or not 0 < len(kinds) <= MAX_PATTERNS
        or not all(isinstance(kind, str) and _KIND.match(kind) for kind in kinds)
        or sorted(set(kinds)) != kinds
    ):
        raise FieldError("grid.kinds is no sorted list of kinds and blocks")
    return Grid(
        **{key: digest(given[key], f"grid.{key}") for key in keys},
        weights=whole(given["weights"], "grid.weights", 1, 1 << 24),
        kinds=tuple(kinds),
    )


def _targets(value: Any, method: Form) -> tuple[Patterns, int]:
    """Read the patterns, and how many targets they choose."""
    lists = ("include", "exclude", "transposed")
    given = table(value, "targets", (*lists, "count"), optional=("stacked",))
    if "stacked" in given:
        if not given["stacked"]:
            raise FieldError("targets.stacked is empty, and is left out where nothing is stacked")
        if not isinstance(method, Method):
            raise FieldError(f"{method.name} is no exact method, so it changes no stacked tensor")
    patterns = {key: _globs(given[key], f"targets.{key}") for key in given if key != "count"}
    return Patterns(**patterns), whole(given["count"], "targets.count", 1, MAX_TARGETS)


def _globs(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_PATTERNS:
        raise FieldError(f"{where} is not a list of at most {MAX_PATTERNS} patterns")
    return tuple(text(item, where) for item in value)


def _coefficients(value: Any, method: Form) -> tuple[int, tuple[Scale, ...]]:
    """Read (bits, scales); floats have no scales."""
    if not isinstance(method, Method):
        dtype = table(value, "coefficients", ("dtype",))["dtype"]
        choice(dtype, "coefficients.dtype", FLOATS.values())
        return next(bits for bits, name in FLOATS.items() if name == dtype), ()
    given = table(value, "coefficients", ("bits", "scales"))
    bits = given["bits"]
    if type(bits) is not int or bits not in BITS:
        raise FieldError(f"coefficients.bits is {bits!r:.40}, not one of {BITS}")
    if bits not in method.bits:
        allowed = " or ".join(map(str, method.bits))
        raise FieldError(f"{method.name} takes coefficients of {allowed} bits, not {bits}")
    return bits, _scales(given["scales"])


def _scales(value: Any) -> tuple[Scale, ...]:
    pairs = from_base64(value, "coefficients.scales")
    if len(pairs) % 2 or 0 in pairs[::2]:
        raise FieldError("coefficients.scales is not pairs (c, e) with c from 1 to 255")
    exponents = (e - 256 if e > 127 else e for e in pairs[1::2])
    return tuple(Scale(c, e) for c, e in zip(pairs[::2], exponents, strict=True))


def _extras(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise FieldError("extras is not a list of names")
    names = tuple(value)
    if in_name_order(set(names)) != names:
        raise FieldError("extras are not in name order, each once")
    return names


def _made(value: Any) -> Mapping[str, str | int | float | bool]:
    if not isinstance(value, dict):
        raise FieldError("made is not an object")
    for key, item in value.items():
        if not isinstance(item, (str, int, float, bool)):
            raise FieldError(f"made.{key:.80} is not a text, number or boolean")
        if isinstance(item, float) and not isfinite(item):
            raise FieldError(f"made.{key:.80} is not finite")
    return value
