"""A `.kd` and its card in a repository of the hub, by `hf:org/name`, from a cache alone."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import kilodelta
from kilodelta.cli import main
from kilodelta.errors import InputError
from kilodelta.export import export_peft
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.models.hub import locate_delta
from kilodelta.trust import keygen
from tests.support import grids, making
from tests.support.processes import GOLDEN

hub = pytest.importorskip("huggingface_hub")

COMMIT = "a" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, laid out as its own client does, which is told not to ask the network."""
    place = tmp_path / "hub"
    models: dict[str, dict[str, str | None]] = {
        "one": {"task.kd": "nola-8.kd", "README.md": None},
        "two": {"small.kd": "nola-8.kd", "files/large.kd": "nola-16.kd"},
        "none": {"README.md": None},
        "base": {"model.safetensors": "base.safetensors"},
    }
    for name, files in models.items():
        repository = place / f"models--org--{name}"
        snapshot = repository / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        blobs = repository / "blobs"
        blobs.mkdir()
        for file, source in files.items():
            blob, link = blobs / file.replace("/", "-"), snapshot / file
            link.parent.mkdir(exist_ok=True)
            if source is None:
                blob.write_text("# A card\n")
            else:
                shutil.copy(GOLDEN / source, blob)
            link.symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return place


@pytest.mark.usefixtures("cache")
def test_a_repository_with_one_file_is_that_file(tmp_path: Path) -> None:
    base = GOLDEN / "base.safetensors"
    done = kilodelta.merge(base, "hf:org/one", tmp_path / "a.safetensors")
    local = kilodelta.merge(base, GOLDEN / "nola-8.kd", tmp_path / "b.safetensors")
    assert done.result == local.result
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.usefixtures("cache")
def test_commands_take_the_name(tmp_path: Path) -> None:
    for line in (
        ["inspect", "hf:org/two/files/large.kd"],
        ["digest", "hf:org/base"],
        ["merge", "hf:org/base", "hf:org/one", "-o", str(tmp_path / "m")],
        ["verify", "hf:org/base", "hf:org/one", str(tmp_path / "m")],
    ):
        result = CliRunner().invoke(main, line)
        assert result.exit_code == 0, result.output


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("diff hf:org/one hf:org/two/files/large.kd --base hf:org/base", "bits"),
        ("diff hf:org/one hf:org/two/small.kd --base hf:org/base", "equal"),
        ("diff hf:org/base hf:org/base", "equal"),
        ("card hf:org/one", "library_name: kilodelta"),
        ("apply {device} hf:org/one", "the device folder does not hold the base of this file"),
        ("run {device} --inputs {inputs} --delta hf:org/one", "does not hold the base"),
    ],
)
def test_a_name_is_taken_wherever_a_file_is(
    line: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kilodelta.device import modes
    from tests.doubles import numpy_device

    monkeypatch.setitem(modes.OPENERS, "patch", numpy_device.StandIn)
    numpy_device.folder(tmp_path / "device", numpy_device.base(tmp_path / "base.safetensors"))
    np.savez(tmp_path / "x.npz", x=numpy_device.BATCH["x"])
    line = line.format(device=tmp_path / "device", inputs=tmp_path / "x.npz")
    result = CliRunner().invoke(main, line.split())
    assert shown in result.output, result.output


def test_what_is_made_of_a_base_is_called_as_the_hub_calls_it(cache: Path, tmp_path: Path) -> None:
    """Its folder is named after a commit, which tells people nothing."""
    pytest.importorskip("torch")
    base, task = GOLDEN / "base.safetensors", tmp_path / "made.kd"
    making.delta(base, Lora(rank=1), patterns=Patterns(include=("tall.weight",))).save(task)
    kilodelta.merge(base, task, tmp_path / "m.safetensors")
    export_peft(base, task, tmp_path / "lora")
    folder, out = cache / "models--org--none" / "snapshots" / COMMIT, tmp_path / "task.kd"
    for file in (tmp_path / "lora").iterdir():
        shutil.copy(file, folder / file.name)
    for line in (
        f"import hf:org/none --base hf:org/base -o {out}",
        f"compress hf:org/base {tmp_path}/m.safetensors -o {out} --method lora --rank 1 --force",
    ):
        result = CliRunner().invoke(main, line.split())
        assert result.exit_code == 0, result.output
        assert kilodelta.inspect(out).base["name"] == "org/base"


def test_a_quantised_base_on_the_hub_is_merged(cache: Path, tmp_path: Path) -> None:
    snapshot = cache / "models--org--base" / "snapshots" / COMMIT
    (snapshot / "model.safetensors").unlink()
    numbers = grids.Numbers(16, 64, 32)
    config = grids.ct_config(symmetric=True)
    made = grids.folder(tmp_path / "q", config, grids.pack_quantized("a", numbers))
    shutil.copytree(made, snapshot, dirs_exist_ok=True)
    delta = making.delta(made, Lora(rank=4), patterns=Patterns(include=("a.weight",)))
    delta.save(tmp_path / "task.kd")
    here, there = (
        kilodelta.merge(base, tmp_path / "task.kd", tmp_path / name)
        for base, name in ((made, "here"), ("hf:org/base", "there"))
    )
    assert here.result == there.result


def test_a_release_signs_the_tokenizer_of_a_base_on_the_hub(cache: Path, tmp_path: Path) -> None:
    keygen(tmp_path / "team")
    snapshot = cache / "models--org--base" / "snapshots" / COMMIT
    (snapshot / "tokenizer.json").write_text("{}")
    signed = tmp_path / "task-1.kd"
    line = f"release hf:org/base hf:org/one -o {signed} --version 1 --sign {tmp_path}/team.key"
    result = CliRunner().invoke(main, [*line.split(), "--task", "intents"])
    assert result.exit_code == 0, result.output
    envelope = json.loads(signed.with_name("task-1.kd.sig").read_text())
    stated = json.loads(base64.b64decode(envelope["payload"]))
    digest = f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
    assert digest in json.dumps(stated)


def test_a_signature_comes_with_its_file(cache: Path) -> None:
    snapshot = cache / "models--org--one" / "snapshots" / COMMIT
    (snapshot / "task.kd.sig").write_text("{}")
    file = locate_delta("hf:org/one")
    assert file.with_name("task.kd.sig").is_file()


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("hf:org/two", "several .kd files: files/large.kd, small.kd"),
        ("hf:org/two/absent.kd", "no such .kd file"),
        ("hf:org/none", "no such .kd file"),
        ("hf:org/two/../../one/task.kd", "names no file of a repository"),
        ("hf:org/two/files//large.kd", "names no file of a repository"),
        ("hf:", "names no repository"),
    ],
)
def test_what_is_no_one_file_is_refused(source: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        locate_delta(source)


def test_a_path_is_never_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert locate_delta("org/one") == Path("org/one")
