"""The JSON of an export's manifest: written, and read field by field, trusting nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from kilodelta.export.manifest.facts import (
    DTYPES,
    FLAVOURS,
    POINTS,
    Artefact,
    DeltaFacts,
    EngineFacts,
    ExportManifest,
    FileFact,
    Port,
    Profile,
    Shape,
    misfit,
)
from kilodelta.files import canonical, untrusted
from kilodelta.files.untrusted import FieldError

VERSION = 1
MANIFEST = "manifest.json"
"""The name of the file, which no artefact may have."""

_PORT_DTYPES = (*DTYPES, "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_CAPABILITY = re.compile(r"sm[1-9][0-9]{1,2}\Z")
_TOP = ("tool", "libraries", "base", "delta", "result", "extras", "model", "artefacts")


def to_json(manifest: ExportManifest) -> dict[str, Any]:
    """Return the manifest as plain JSON values, in the order of the file."""
    return {
        "version": VERSION,
        "tool": manifest.tool,
        "libraries": dict(manifest.libraries),
        "base": {"name": manifest.base_name, "root": manifest.base_root},
        "delta": {**asdict(manifest.delta.file), "method": dict(manifest.delta.method)},
        "result": {"root": manifest.result_root},
        "extras": list(manifest.extras),
        "model": manifest.model,
        "artefacts": [_artefact_json(artefact) for artefact in manifest.artefacts],
    }


def to_text(manifest: ExportManifest) -> bytes:
    """Return the file's bytes: indented UTF-8 that ends with a line break."""
    text = json.dumps(to_json(manifest), indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def artefact_text(artefact: Artefact) -> bytes:
    """Return one artefact as JSON text, for a folder that has no fine-tune and so no manifest."""
    return canonical.dumps(_artefact_json(artefact)).encode("utf-8")


def parse_artefact(data: bytes) -> Artefact:
    """Read what `artefact_text` returned.

    Raises:
        FieldError: naming the field that is wrong.
        NotCanonicalError: it is not JSON.
    """
    return _artefact(canonical.loads(data), "the artefact")


def _artefact_json(artefact: Artefact) -> dict[str, Any]:
    return {
        "kind": artefact.kind,
        "dtype": artefact.dtype,
        "files": [asdict(file) for file in artefact.files],
        "inputs": [asdict(port) for port in artefact.inputs],
        "outputs": [asdict(port) for port in artefact.outputs],
        "profile": {
            name: dict(zip(POINTS, shapes, strict=True))
            for name, shapes in artefact.profile.items()
        },
        "engine": None if artefact.engine is None else asdict(artefact.engine),
    }


def parse(data: bytes) -> ExportManifest:
    """Read a manifest from its JSON text.

    Raises:
        FieldError: naming the field that is wrong.
        NotCanonicalError: it is not JSON.
    """
    whole = untrusted.mapping(canonical.loads(data), "the manifest")
    if type(whole.get("version")) is not int or whole["version"] != VERSION:
        raise FieldError(f"version is {whole.get('version')!r:.40}; this kilodelta reads {VERSION}")
    top = untrusted.table(whole, "the manifest", {"version", *_TOP})
    base = untrusted.table(top["base"], "base", ("name", "root"))
    result = untrusted.table(top["result"], "result", ("root",))
    model = top["model"]
    manifest = ExportManifest(
        tool=untrusted.text(top["tool"], "tool"),
        libraries=_libraries(top["libraries"]),
        base_name=untrusted.text(base["name"], "base.name"),
        base_root=untrusted.digest(base["root"], "base.root"),
        delta=_delta(top["delta"]),
        result_root=untrusted.digest(result["root"], "result.root"),
        extras=untrusted.texts(top["extras"], "extras"),
        model=None if model is None else untrusted.text(model, "model"),
        artefacts=untrusted.listed(top["artefacts"], "artefacts", _artefact),
    )
    _require_unique(file.file for artefact in manifest.artefacts for file in artefact.files)
    return manifest


def _require_unique(names: Iterable[str]) -> None:
    seen: set[str] = {MANIFEST}
    for name in names:
        if name in seen:
            raise FieldError(f"artefacts name the file {name!r:.80} twice")
        seen.add(name)


def _libraries(value: Any) -> Mapping[str, str]:
    table = untrusted.mapping(value, "libraries")
    return MappingProxyType({n: untrusted.text(v, f"libraries.{n:.80}") for n, v in table.items()})


def _delta(value: Any) -> DeltaFacts:
    table = untrusted.table(value, "delta", ("file", "sha256", "nbytes", "method"))
    method = untrusted.mapping(table.pop("method"), "delta.method")
    untrusted.text(method.get("name"), "delta.method.name")
    for key, option in method.items():
        if not isinstance(option, (str, int, float)):
            raise FieldError(f"delta.method.{key:.80} is not a text, number or boolean")
    file = FileFact(
        file=untrusted.text(table["file"], "delta.file"),  # a name to show, never opened
        sha256=untrusted.digest(table["sha256"], "delta.sha256"),
        nbytes=untrusted.whole(table["nbytes"], "delta.nbytes"),
    )
    return DeltaFacts(file=file, method=MappingProxyType(method))


def _file(value: Any, where: str) -> FileFact:
    table = untrusted.table(value, where, ("file", "sha256", "nbytes"))
    return FileFact(
        file=untrusted.file_name(table["file"], f"{where}.file"),
        sha256=untrusted.digest(table["sha256"], f"{where}.sha256"),
        nbytes=untrusted.whole(table["nbytes"], f"{where}.nbytes"),
    )


def _artefact(value: Any, where: str) -> Artefact:
    keys = ("kind", "dtype", "files", "inputs", "outputs", "profile", "engine")
    table = untrusted.table(value, where, keys)
    kind = untrusted.choice(table["kind"], f"{where}.kind", ("onnx", "engine"))
    files = untrusted.listed(table["files"], f"{where}.files", _file)
    if not files:
        raise FieldError(f"{where}.files is empty")
    if (kind == "engine") != (table["engine"] is not None):
        raise FieldError(f"{where}.engine and its kind {kind} disagree")
    inputs = untrusted.listed(table["inputs"], f"{where}.inputs", _port)
    return Artefact(
        kind=kind,  # type: ignore[arg-type]
        dtype=untrusted.choice(table["dtype"], f"{where}.dtype", DTYPES),  # type: ignore[arg-type]
        files=files,
        inputs=inputs,
        outputs=untrusted.listed(table["outputs"], f"{where}.outputs", _port),
        profile=_profile(table["profile"], f"{where}.profile", inputs),
        engine=_engine(table["engine"], f"{where}.engine") if kind == "engine" else None,
    )


def _port(value: Any, where: str) -> Port:
    table = untrusted.table(value, where, ("name", "dtype", "shape"))
    return Port(
        name=untrusted.text(table["name"], f"{where}.name"),
        dtype=untrusted.choice(table["dtype"], f"{where}.dtype", _PORT_DTYPES),
        shape=untrusted.listed(table["shape"], f"{where}.shape", _extent),
    )


def _extent(value: Any, where: str) -> int | str:
    read = untrusted.text if isinstance(value, str) else untrusted.whole
    return read(value, where)


def _profile(value: Any, where: str, inputs: tuple[Port, ...]) -> Profile:
    table = untrusted.table(value, where, (port.name for port in inputs))
    return MappingProxyType(
        {port.name: _points(table[port.name], f"{where}.{port.name}", port) for port in inputs}
    )


def _points(value: Any, where: str, port: Port) -> tuple[Shape, Shape, Shape]:
    table = untrusted.table(value, where, POINTS)
    low, usual, high = (untrusted.shape(table[point], f"{where}.{point}") for point in POINTS)
    if problem := misfit((low, usual, high), port):
        raise FieldError(f"{where}: {problem}")
    return low, usual, high


def _engine(value: Any, where: str) -> EngineFacts:
    keys = ("flavour", "version", "capabilities", "tf32", "refittable", "onnx")
    table = untrusted.table(value, where, keys)
    flavour = untrusted.choice(table["flavour"], f"{where}.flavour", FLAVOURS)
    capabilities = untrusted.listed(table["capabilities"], f"{where}.capabilities", _capability)
    if not capabilities:
        raise FieldError(f"{where}.capabilities is empty")
    return EngineFacts(
        flavour=flavour,  # type: ignore[arg-type]
        version=untrusted.text(table["version"], f"{where}.version"),
        capabilities=capabilities,
        tf32=untrusted.flag(table["tf32"], f"{where}.tf32"),
        refittable=untrusted.texts(table["refittable"], f"{where}.refittable"),
        onnx=untrusted.digest(table["onnx"], f"{where}.onnx"),
    )


def _capability(value: Any, where: str) -> str:
    name = untrusted.text(value, where)
    if not _CAPABILITY.match(name):
        raise FieldError(f"{where} is {name!r:.40}, not like sm86")
    return name
