"""A `.kd` and its card in a repository of the hub, by `hf:org/name`, from a cache alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import kilodelta
from kilodelta.cli import main
from kilodelta.errors import InputError
from kilodelta.models.hub import locate_delta
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
