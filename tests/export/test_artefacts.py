"""An export's manifest: written, read back, hostile ones refused; files checked byte for byte."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kilodelta.errors import FileError, ProofError
from kilodelta.export.manifest import artefacts
from kilodelta.export.manifest.facts import (
    Artefact,
    DeltaFacts,
    EngineFacts,
    ExportManifest,
    FileFact,
    Port,
)

ROOT = "sha256:" + "ab" * 32
CONTENT = {"model.fp16.onnx": b"graph", "model.fp16.onnx.data": b"weights", "m.engine": b"plan"}


def fact(name: str) -> FileFact:
    digest = hashlib.sha256(CONTENT[name]).hexdigest()
    return FileFact(file=name, sha256=f"sha256:{digest}", nbytes=len(CONTENT[name]))


def manifest() -> ExportManifest:
    """One of everything."""
    ids = Port(name="input_ids", dtype="int64", shape=("batch", "sequence"))
    pixels = Port(name="pixels", dtype="float16", shape=("batch", 3, 8, 8))
    out = Port(name="logits", dtype="float16", shape=("batch", 3))
    profile = {
        "input_ids": ((1, 1), (8, 64), (32, 128)),
        "pixels": ((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8)),
    }
    onnx = Artefact(
        kind="onnx",
        dtype="float16",
        files=(fact("model.fp16.onnx"), fact("model.fp16.onnx.data")),
        inputs=(ids, pixels),
        outputs=(out,),
        profile=profile,
    )
    engine = EngineFacts(
        flavour="tensorrt_rtx",
        version="1.7.1.116",
        capabilities=("sm86", "sm120"),
        tf32=False,
        refittable=("layer.weight",),
        onnx=fact("model.fp16.onnx").sha256,
    )
    return ExportManifest(
        tool="kilodelta 0.1.0",
        libraries={"torch": "2.13.0"},
        base_name="",
        base_root=ROOT,
        delta=DeltaFacts(
            file=FileFact(file="a:b/task.kd", sha256=ROOT, nbytes=9),
            method={"name": "nola", "rank": 8, "alpha": 0.5},
        ),
        result_root=ROOT,
        extras=("head.weight",),
        model="package.module:function",
        artefacts=(onnx, replace(onnx, kind="engine", files=(fact("m.engine"),), engine=engine)),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in CONTENT.items():
        (tmp_path / name).write_bytes(data)
    artefacts.write(manifest(), tmp_path)
    return tmp_path


def test_what_is_written_is_read_back(folder: Path) -> None:
    assert artefacts.read(folder) == manifest()
    artefacts.check_files(folder, artefacts.read(folder))
    assert [artefact.file for artefact in manifest().artefacts] == ["model.fp16.onnx", "m.engine"]


def test_the_text_by_hand(folder: Path) -> None:
    """Readers in other languages rely on these keys."""
    found = json.loads((folder / "manifest.json").read_text())
    assert list(found) == [
        "version", "tool", "libraries", "base", "delta", "result", "extras", "model", "artefacts"
    ]  # fmt: skip
    assert found["version"] == 1
    assert found["base"] == {"name": "", "root": ROOT}
    assert found["delta"] == {
        "file": "a:b/task.kd", "sha256": ROOT, "nbytes": 9,
        "method": {"name": "nola", "rank": 8, "alpha": 0.5},
    }  # fmt: skip
    onnx, engine = found["artefacts"]
    assert list(onnx) == ["kind", "dtype", "files", "inputs", "outputs", "profile", "engine"]
    assert onnx["inputs"][0] == {
        "name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]
    }  # fmt: skip
    assert onnx["profile"]["input_ids"] == {"min": [1, 1], "opt": [8, 64], "max": [32, 128]}
    assert onnx["engine"] is None
    assert engine["engine"] == {
        "flavour": "tensorrt_rtx", "version": "1.7.1.116", "capabilities": ["sm86", "sm120"],
        "tf32": False, "refittable": ["layer.weight"], "onnx": fact("model.fp16.onnx").sha256,
    }  # fmt: skip


def set_at(path: str, value: Any) -> Callable[[Any], None]:
    """A change of one field: `artefacts.0.files.1.file` and its new value."""

    def change(table: Any) -> None:
        *way, last = [int(key) if key.isdecimal() else key for key in path.split("/")]
        for key in way:
            table = table[key]
        table[last] = value

    return change


def without(path: str) -> Callable[[Any], None]:
    def change(table: Any) -> None:
        *way, last = path.split("/")
        for key in way:
            table = table[int(key) if key.isdecimal() else key]
        del table[last]

    return change


HOSTILE: list[tuple[Callable[[Any], None], str]] = [
    (set_at("version", 2), "version is 2; this kilodelta reads 1"),
    (set_at("version", True), "version is True"),
    (set_at("surprise", 1), "the manifest has an unknown key 'surprise'"),
    (without("base"), "the manifest lacks 'base'"),
    (without("artefacts/0/profile"), r"artefacts\[0\] lacks 'profile'"),
    (set_at("base", []), "base is not an object"),
    (set_at("base/root", "sha256:00"), "base.root is not sha256"),
    (set_at("base/root", ROOT + "\n"), "base.root is not sha256"),
    (set_at("base/root", ROOT.upper()), "base.root is not sha256"),
    (set_at("tool", 3), "tool is not a text"),
    (set_at("tool", "x" * 1025), "tool is not a text of at most 1024"),
    (set_at("libraries/torch", None), "libraries.torch is not a text"),
    (set_at("delta/nbytes", -1), "delta.nbytes is -1, not a whole number"),
    (set_at("delta/nbytes", True), "delta.nbytes is True, not a whole number"),
    (set_at("delta/nbytes", 1.0), "delta.nbytes is 1.0, not a whole number"),
    (set_at("delta/method/rank", [8]), "delta.method.rank is not a text, number or boolean"),
    (set_at("delta/method/rank", None), "delta.method.rank is not a text, number or boolean"),
    (without("delta/method/name"), "delta.method.name is not a text"),
    (set_at("extras", "head"), "extras is not a list"),
    (set_at("extras/0", 1), r"extras\[0\] is not a text"),
    (set_at("artefacts", {}), "artefacts is not a list"),
    (set_at("artefacts/0/kind", "exe"), r"artefacts\[0\].kind is 'exe', not one of onnx, engine"),
    (set_at("artefacts/0/dtype", ["float16"]), r"artefacts\[0\].dtype is \['float16'\]"),
    (set_at("artefacts/0/files", []), r"artefacts\[0\].files is empty"),
    *(
        (set_at("artefacts/0/files/1/file", name), "not a file name")
        for name in ("../up", "/etc/passwd", "a\\b", "..", ".", "", "c:x", "a\0b", "a\nb")
    ),
    (set_at("artefacts/0/files/0/file", "manifest.json"), "'manifest.json' twice"),
    (set_at("artefacts/0/files/0/file", "m.engine"), "the file 'm.engine' twice"),
    (set_at("artefacts/0/inputs/0/dtype", "string"), "dtype is 'string'"),
    (set_at("artefacts/0/inputs/0/shape", ["batch", 1.5]), r"shape\[1\] is 1.5"),
    (set_at("artefacts/0/profile/input_ids/min", [1]), "have not the 2 axes of input_ids"),
    (set_at("artefacts/0/profile/input_ids/min", [0, 1]), "do not rise from 1 on"),
    (set_at("artefacts/0/profile/input_ids/opt", [33, 64]), "1, 33, 32 do not rise"),
    (set_at("artefacts/0/profile/pixels/max", [32, 3, 8, 9]), "is 8 and cannot be 8 to 9"),
    (without("artefacts/0/profile/pixels"), "profile lacks 'pixels'"),
    (set_at("artefacts/1/engine", None), "engine and its kind engine disagree"),
    (set_at("artefacts/1/kind", "onnx"), "engine and its kind onnx disagree"),
    (set_at("artefacts/1/engine/flavour", "trt"), "flavour is 'trt'"),
    (set_at("artefacts/1/engine/capabilities", []), "capabilities is empty"),
    (set_at("artefacts/1/engine/capabilities", ["sm86\n"]), "not like sm86"),
    (set_at("artefacts/1/engine/capabilities", [86]), r"capabilities\[0\] is not a text"),
    (set_at("artefacts/1/engine/tf32", 0), "tf32 is 0, not true or false"),
    (set_at("artefacts/1/engine/refittable", True), "refittable is not a list"),
    (set_at("artefacts/1/engine/onnx", None), "onnx is not sha256"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE)
def test_a_hostile_manifest(change: Callable[[Any], None], message: str, folder: Path) -> None:
    place = folder / "manifest.json"
    table = json.loads(place.read_text())
    change(table)
    place.write_text(json.dumps(table))
    with pytest.raises(FileError, match=message) as caught:
        artefacts.read(folder)
    assert str(place) in caught.value.what


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"[]", b"{", b'{"version": 1, "version": 1}', b'{"version": NaN}', b"[" * 9999],
)
def test_no_manifest_at_all(data: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(FileError, match=r"manifest\.json is wrong"):
        artefacts.read(folder)


def test_a_missing_or_huge_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "LIMIT", 100)
    with pytest.raises(FileError, match="more than 100 bytes"):
        artefacts.read(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileError, match="cannot be read: No such file"):
        artefacts.read(folder)


def test_every_changed_file_is_named_with_both_values(folder: Path) -> None:
    (folder / "model.fp16.onnx").write_bytes(b"Graph")
    (folder / "model.fp16.onnx.data").write_bytes(b"weight")
    (folder / "m.engine").unlink()
    with pytest.raises(ProofError) as caught:
        artefacts.check_files(folder, artefacts.read(folder))
    told = caught.value.what
    assert f"not {fact('model.fp16.onnx').sha256}" in told
    assert f"model.fp16.onnx is sha256:{hashlib.sha256(b'Graph').hexdigest()}" in told
    assert "model.fp16.onnx.data has 6 bytes, not 7" in told
    assert "m.engine cannot be read: No such file" in told


@pytest.mark.parametrize("name", ["x.bin", "manifest.json"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_no_pipe_or_link_is_read(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A pipe would block for ever; /dev/zero has the right size, 0, and never ends."""
    stranger = replace(
        manifest().artefacts[0], files=(FileFact(file="x.bin", sha256=ROOT, nbytes=0),)
    )
    artefacts.write(replace(manifest(), artefacts=(stranger,)), folder)
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        (folder / name).symlink_to("/dev/zero")
    with pytest.raises((ProofError, FileError), match=f"{name} is a {kind}"):
        artefacts.check_files(folder, artefacts.read(folder))


def test_reading_needs_no_torch_and_no_onnx() -> None:
    code = (
        "import sys, kilodelta.export.manifest.artefacts\n"
        "print([m for m in ('torch', 'onnx', 'onnx_ir', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
