"""Read `fleet.toml`: bases, fine-tunes and targets, every field checked, unknown ones refused.

::

    version = 1

    [base.minilm]
    path = "base"                     # relative to this file

    [[fine-tunes]]
    base = "minilm"                   # may be left out where there is one base
    tuned = ["tuned/*"]               # globs of tuned models; each is compressed
    inputs = "inputs/{name}.jsonl"    # {name} is the model's own name
    compress = { budget = "12KB", steps = 400 }

    [[fine-tunes]]
    deltas = ["ready/*.kd"]           # or files that exist

    [target.onnx16]
    kind = "onnx"                     # merge, onnx, tensorrt, peft, gguf, adapter, release
    dtype = "fp16"
    resources = { sm87 = 1 }          # what a machine of a cluster must have
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.files.untrusted import FieldError

VERSION = 1
MAX_BYTES = 1 << 20
MAX_FINE_TUNES = 100_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")
COMPRESS = {
    "budget": str,
    "method": str,
    "rank": int,
    "bases": int,
    "bits": int,
    "steps": int,
    "lr": float,
    "batch": int,
    "seed": int,
    "held_out": int,
    "max_length": int,
    "limit": int,
    "field": str,
    "extras": str,
    "targets": list,
    "exclude": list,
    "min_agreement": float,
}
"""Options of `kilodelta compress` that a fleet may set, by their Python names, and their types."""
KINDS: Mapping[str, Mapping[str, type]] = {
    "merge": {},
    "onnx": {"dtype": str},
    "tensorrt": {"dtype": str, "for": list},
    "peft": {"dtype": str, "svd": int},
    "gguf": {"dtype": str, "svd": int},
    "adapter": {"dtype": str, "rank": int},
    "release": {"version": int, "probe": bool},
}
"""Target kinds, and the options of each."""
NEEDS_INPUTS = {"release"}


@dataclass(frozen=True, kw_only=True)
class FleetBase:
    """A base model: its name here, where it is, and how it is opened."""

    name: str
    path: Path
    inputs: Path | None = None
    model: str = ""


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """One fine-tune: a tuned model that is compressed, or a `.kd` file that exists."""

    name: str
    base: str
    tuned: Path | None = None
    delta: Path | None = None
    inputs: Path | None = None
    labels: Path | None = None
    compress: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FleetTarget:
    """What is made of every fine-tune, with the options of its kind."""

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A whole fleet file, its globs resolved."""

    path: Path
    bases: Mapping[str, FleetBase]
    fine_tunes: tuple[FineTune, ...]
    targets: tuple[FleetTarget, ...]


def read_fleet(path: str | Path) -> Fleet:
    """Read a fleet file.

    Raises:
        InputError: it cannot be read, a field is unknown or wrong, a glob matches nothing, or two
            fine-tunes have one name; the message names the field.
    """
    place = Path(path)
    try:
        with place.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{place} cannot be read: {error.strerror}", fix="give a fleet.toml"
        ) from None
    try:
        if len(data) > MAX_BYTES:
            raise FieldError(f"it is larger than {MAX_BYTES} bytes")
        return _fleet(place, _parse(data))
    except FieldError as error:
        raise InputError(f"{place}: {error}", fix="docs/fleet.md lists every field") from None


def _parse(data: bytes) -> dict[str, Any]:
    try:
        import tomllib as toml
    except ModuleNotFoundError:  # Python 3.10
        from kilodelta.errors import require

        toml = require("tomli", extra="fleet", why="read fleet.toml")
    try:
        return toml.loads(data.decode("utf-8"))
    except ValueError as error:
        raise FieldError(f"it is no TOML: {error}") from None


def _fleet(place: Path, table: dict[str, Any]) -> Fleet:
    _known(table, "", {"version", "base", "fine-tunes", "target"})
    if table.get("version") != VERSION or table.get("version") is True:
        raise FieldError(f"version is {table.get('version')!r:.40}, not {VERSION}")
    root = place.parent
    bases = {n: _base(root, n, t) for n, t in _tables(table, "base").items()}
    if not bases:
        raise FieldError("there is no [base.NAME]")
    targets = tuple(_target(n, t) for n, t in _tables(table, "target").items())
    groups = table.get("fine-tunes", [])
    if not isinstance(groups, list) or not groups:
        raise FieldError("there are no [[fine-tunes]]")
    tunes = [t for i, g in enumerate(groups) for t in _group(root, f"fine-tunes[{i}]", g, bases)]
    names: dict[str, FineTune] = {}
    for tune in tunes:
        if tune.name in names:
            raise FieldError(
                f"two fine-tunes are called {tune.name!r}: {_source(names[tune.name])} and "
                f"{_source(tune)}"
            )
        names[tune.name] = tune
    if len(tunes) > MAX_FINE_TUNES:
        raise FieldError(f"there are more than {MAX_FINE_TUNES} fine-tunes")
    return Fleet(path=place, bases=bases, fine_tunes=tuple(tunes), targets=targets)


def _source(tune: FineTune) -> Path | None:
    return tune.tuned or tune.delta


def _tables(table: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    found = table.get(key, {})
    if not isinstance(found, dict):
        raise FieldError(f"{key} is not a table [{key}.NAME]")
    for name, value in found.items():
        if not _NAME.match(name):
            raise FieldError(f"{key}.{name!r:.80} is no name of letters, digits, '.', '_', '-'")
        if not isinstance(value, dict):
            raise FieldError(f"{key}.{name} is not a table")
    return found


def _known(table: Mapping[str, Any], where: str, keys: Iterable[str]) -> None:
    for key in table:
        if key not in keys:
            raise FieldError(f"{where + '.' if where else ''}{key!s:.80} is no field known here")


def _typed(table: Mapping[str, Any], where: str, key: str, kind: type, default: Any) -> Any:
    """Take a value of a type; whole numbers count as numbers, true and false do not."""
    if key not in table:
        return default
    value = table[key]
    fits = isinstance(value, kind) or (kind is float and type(value) is int)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise FieldError(f"{where}.{key} is {value!r:.60}, not of type {kind.__name__}")
    if kind is list and not all(isinstance(item, str) for item in value):
        raise FieldError(f"{where}.{key} is not a list of texts")
    return value


def _options(table: Mapping[str, Any], where: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    _known(table, where, kinds)
    return {key: _typed(table, where, key, kinds[key], None) for key in table}


def _base(root: Path, name: str, table: dict[str, Any]) -> FleetBase:
    where = f"base.{name}"
    _known(table, where, {"path", "inputs", "model"})
    path = root / _typed(table, where, "path", str, "")
    if "path" not in table or not path.exists():
        raise FieldError(f"{where}.path: {path} is missing")
    inputs = _typed(table, where, "inputs", str, None)
    return FleetBase(
        name=name,
        path=path,
        inputs=None if inputs is None else _present(root / inputs, f"{where}.inputs"),
        model=_typed(table, where, "model", str, ""),
    )


def _present(path: Path, where: str) -> Path:
    if not path.exists():
        raise FieldError(f"{where}: {path} is missing")
    return path


def _target(name: str, table: dict[str, Any]) -> FleetTarget:
    where = f"target.{name}"
    kind = _typed(table, where, "kind", str, None)
    if kind not in KINDS:
        raise FieldError(f"{where}.kind is {kind!r:.60}, not one of {', '.join(KINDS)}")
    resources = _typed(table, where, "resources", dict, {})
    for key, value in resources.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise FieldError(f"{where}.resources.{key!s:.60} is {value!r:.40}, no positive number")
    options = {k: v for k, v in table.items() if k not in ("kind", "resources")}
    checked = _options(options, where, KINDS[kind])
    if kind == "tensorrt" and not checked.get("for"):
        raise FieldError(f"{where}.for is missing: for example ['sm86', 'sm89']")
    if kind == "release" and not checked.get("version", 0) > 0:
        raise FieldError(f"{where}.version is missing: a whole number from 1 on")
    return FleetTarget(name=name, kind=kind, options=checked, resources=resources)


def _group(root: Path, where: str, table: Any, bases: Mapping[str, FleetBase]) -> list[FineTune]:
    if not isinstance(table, dict):
        raise FieldError(f"{where} is not a table")
    _known(table, where, {"base", "tuned", "deltas", "inputs", "labels", "compress"})
    only = next(iter(bases)) if len(bases) == 1 else None
    base = _typed(table, where, "base", str, only)
    if base not in bases:
        raise FieldError(f"{where}.base is {base!r:.60}, not one of {', '.join(bases)}")
    if ("tuned" in table) == ("deltas" in table):
        raise FieldError(f"{where} needs either tuned or deltas")
    key = "tuned" if "tuned" in table else "deltas"
    if key == "deltas" and (extra := sorted({"labels", "compress"} & set(table))):
        raise FieldError(f"{where}.{extra[0]} is for tuned models, not for deltas")
    paths = _globbed(root, f"{where}.{key}", _typed(table, where, key, list, []))
    compress = _options(_typed(table, where, "compress", dict, {}), f"{where}.compress", COMPRESS)
    texts = {n: _typed(table, where, n, str, None) for n in ("inputs", "labels")}

    def named(name: str, which: str, default: Path | None) -> Path | None:
        text = texts[which]
        if text is None:
            return default
        return _present(root / text.replace("{name}", name), f"{where}.{which}")

    made = []
    for path in paths:
        name = path.name.removesuffix(".safetensors").removesuffix(".kd")
        if not _NAME.match(name):
            raise FieldError(f"{where}: {path} has no name of letters, digits, '.', '_', '-'")
        made.append(
            FineTune(
                name=name,
                base=base,
                tuned=path if key == "tuned" else None,
                delta=path if key == "deltas" else None,
                inputs=named(name, "inputs", bases[base].inputs),
                labels=named(name, "labels", None),
                compress=compress,
            )
        )
    return made


def _globbed(root: Path, where: str, patterns: list[str]) -> list[Path]:
    """Paths of all patterns in name order; each pattern must match something."""
    out: dict[Path, None] = {}
    for pattern in patterns:
        hits = sorted(glob.glob(str(root / pattern)))
        if not hits:
            raise FieldError(f"{where}: {pattern!r:.200} matches nothing in {root.resolve()}")
        out |= dict.fromkeys(map(Path, hits))
    return sorted(out)
