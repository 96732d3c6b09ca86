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

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kilodelta.device.folder.bundle import MODES
from kilodelta.device.make.settings import settings_from
from kilodelta.errors import InputError
from kilodelta.files import plain
from kilodelta.files.dtypes import PRECISIONS
from kilodelta.files.untrusted import FieldError, short
from kilodelta.fleet.compression import compression_options
from kilodelta.fleet.definition import FineTune, Fleet, FleetBase, FleetTarget
from kilodelta.fleet.fields import (
    NAME,
    globbed,
    named_tables,
    present,
    refuse_unknown,
    typed,
    typed_fields,
)
from kilodelta.models.entry import is_entry

VERSION = 1
DELTA = "delta"
"""The folder of a fine-tune's compressed file, beside those of its targets."""
MAX_BYTES = 1 << 20
MAX_FINE_TUNES = 100_000
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
    "release": {"version": int, "probe": bool, "bundle": dict},
}
"""Target kinds, and the options of each."""
BUNDLE = {
    "mode": str,
    "engine": list,
    "flavour": str,
    "provider": str,
    "dtype": str,
    "rank": int,
    "slots": int,
    "targets": list,
    "exclude": list,
    "profile": list,
    "outputs": list,
    "blocks": str,
}
"""Options of `kilodelta bundle` for the device folder that a target's releases go to."""
NEEDS_INPUTS = {"release"}
DTYPES = tuple(row.short for row in PRECISIONS.values())
_CAPABILITY = re.compile(r"sm[1-9][0-9]{1,2}\Z")


def read_fleet(path: str | Path) -> Fleet:
    """Read a fleet file.

    Raises:
        InputError: it cannot be read, a field is unknown or wrong, a glob matches nothing, or two
            fine-tunes have one name; the message names the field.
    """
    place = Path(path)
    try:
        data = plain.read(place, MAX_BYTES, follow=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"{place} cannot be read: {why}",
            fix="give a fleet.toml, or of `fleet status` and `report` the folder of results",
        ) from None
    try:
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
    except (ValueError, RecursionError) as error:
        raise FieldError(f"it is no TOML: {error}") from None


def _fleet(place: Path, table: dict[str, Any]) -> Fleet:
    refuse_unknown(table, "", {"version", "base", "fine-tunes", "target"})
    if "version" not in table:
        raise FieldError(f"version is missing: version = {VERSION}")
    if table.get("version") != VERSION or table.get("version") is True:
        raise FieldError(f"version is {table.get('version')!r:.40}, not {VERSION}")
    root = place.parent
    bases = {n: _base(root, n, t) for n, t in named_tables(table, "base").items()}
    if not bases:
        raise FieldError("there is no [base.NAME]")
    targets = tuple(_target(n, t) for n, t in named_tables(table, "target").items())
    groups = table.get("fine-tunes", [])
    if not isinstance(groups, list) or not groups:
        raise FieldError("there are no [[fine-tunes]]")
    tunes = [t for i, g in enumerate(groups) for t in _group(root, f"fine-tunes[{i}]", g, bases)]
    compresses = any(tune.tuned for tune in tunes)
    if not targets and not compresses:
        raise FieldError("there is no [target.NAME], and nothing to compress")
    if compresses and DELTA in {target.name for target in targets}:
        raise FieldError(f"target.{DELTA}: compressed files lie under that name; take another one")
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


def _base(root: Path, name: str, table: dict[str, Any]) -> FleetBase:
    where = f"base.{name}"
    refuse_unknown(table, where, {"path", "inputs", "model"})
    path = root / typed(table, where, "path", str, "")
    if "path" not in table or not path.exists():
        raise FieldError(f"{where}.path: {path} is missing")
    inputs = typed(table, where, "inputs", str, None)
    return FleetBase(
        name=name,
        path=path,
        inputs=None if inputs is None else present(root / inputs, f"{where}.inputs"),
        model=_entry(table, where),
    )


def _entry(table: dict[str, Any], where: str) -> str:
    """Take the function that builds a model; "" where none is named."""
    entry: str = typed(table, where, "model", str, "")
    if "model" in table and not is_entry(entry):
        raise FieldError(f"{where}.model is {entry!r:.80}, not package.module:function")
    return entry


def _target(name: str, table: dict[str, Any]) -> FleetTarget:
    where = f"target.{name}"
    kind = typed(table, where, "kind", str, None)
    if kind is None:
        raise FieldError(f"{where}.kind is missing: one of {', '.join(KINDS)}")
    if kind not in KINDS:
        raise FieldError(f"{where}.kind is {kind!r:.60}, not one of {', '.join(KINDS)}")
    resources = typed(table, where, "resources", dict, {})
    if "" in resources:
        raise FieldError(f"{where}.resources has a resource without a name")
    for key, value in resources.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e9:
            raise FieldError(f"{where}.resources.{key!s:.60} is {value!r:.40}, no positive number")
    options = {k: v for k, v in table.items() if k not in ("kind", "resources")}
    checked = typed_fields(options, where, KINDS[kind])
    _require_precision(checked, where)
    _require_counts(checked, where)
    if kind == "tensorrt":
        _require_capabilities(checked.get("for"), f"{where}.for")
    if "bundle" in checked:
        inner = typed_fields(checked["bundle"], f"{where}.bundle", BUNDLE)
        if "mode" not in inner:
            raise FieldError(f"{where}.bundle.mode is missing: one of {', '.join(MODES)}")
        if "engine" in inner:
            _require_capabilities(inner["engine"], f"{where}.bundle.engine")
        with _explained(f"{where}.bundle"):
            settings_from(**inner)
    if kind == "release" and not checked.get("version", 0) > 0:
        raise FieldError(f"{where}.version is missing: a whole number from 1 on")
    return FleetTarget(name=name, kind=kind, options=checked, resources=resources)


def _require_precision(options: Mapping[str, Any], where: str) -> None:
    dtype = options.get("dtype", DTYPES[0])
    if dtype not in DTYPES:
        raise FieldError(f"{where}.dtype is {dtype!r:.40}, not one of {', '.join(DTYPES)}")


def _require_counts(options: Mapping[str, Any], where: str) -> None:
    for key in ("rank", "svd", "version"):
        if key in options and not 0 < options[key] < 1 << 63:
            raise FieldError(
                f"{where}.{key} is {short(options[key])}, not a whole number from 1 to 2^63 - 1"
            )


def _require_capabilities(names: Any, where: str) -> None:
    if not names:
        raise FieldError(f"{where} is missing: for example ['sm86', 'sm89']")
    for name in names:
        if not _CAPABILITY.match(name):
            raise FieldError(f"{where} names {name!r:.40}, which is not like sm86")


def _require_options(table: Mapping[str, Any], where: str, *, learns: bool) -> None:
    with _explained(where):
        compression_options(table, learns=learns)


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Say in which field options are that a command refuses."""
    try:
        yield
    except InputError as error:
        raise FieldError(f"{where}: {error.what}; {error.fix}") from None


def _group(root: Path, where: str, table: Any, bases: Mapping[str, FleetBase]) -> list[FineTune]:
    if not isinstance(table, dict):
        raise FieldError(f"{where} is not a table")
    refuse_unknown(table, where, {"base", "tuned", "deltas", "inputs", "labels", "compress"})
    only = next(iter(bases)) if len(bases) == 1 else None
    base = typed(table, where, "base", str, only)
    if base is None:
        raise FieldError(f"{where}.base is missing: one of {', '.join(bases)}")
    if base not in bases:
        raise FieldError(f"{where}.base is {base!r:.60}, not one of {', '.join(bases)}")
    if ("tuned" in table) == ("deltas" in table):
        raise FieldError(f"{where} needs either tuned or deltas")
    key = "tuned" if "tuned" in table else "deltas"
    if key == "deltas" and (extra := sorted({"labels", "compress"} & set(table))):
        raise FieldError(f"{where}.{extra[0]} is for tuned models, not for deltas")
    paths = globbed(root, f"{where}.{key}", typed(table, where, key, list, []))
    compress = typed_fields(
        typed(table, where, "compress", dict, {}), f"{where}.compress", COMPRESS
    )
    texts = {n: typed(table, where, n, str, None) for n in ("inputs", "labels")}
    if key == "tuned":
        learns = texts["inputs"] is not None or bases[base].inputs is not None
        _require_options(compress, f"{where}.compress", learns=learns)

    def named(name: str, which: str, default: Path | None) -> Path | None:
        text = texts[which]
        if text is None:
            return default
        return present(root / text.replace("{name}", name), f"{where}.{which}")

    made = []
    for path in paths:
        name = path.name.removesuffix(".safetensors").removesuffix(".kd")
        if not NAME.match(name):
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
