"""Names go to the hub with the prefix `hf:` only, and a cache's own references stay inside it."""

from __future__ import annotations

from pathlib import Path

import pytest

import kilodelta
from kilodelta.errors import CheckpointError, InputError
from kilodelta.models import hub
from kilodelta.models.hub import is_hub_name, locate


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names that the hub was asked for."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    names: list[str] = []

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        assert "*.py" not in allow_patterns
        names.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return names


def test_only_the_prefix_asks_the_hub(asked: list[str], tmp_path: Path) -> None:
    assert locate("hf:org/name") == tmp_path
    assert locate("hf:gpt2") == tmp_path
    for path in ("org/name", "gpt2", "./hf:org/name", "base/"):
        assert not is_hub_name(path)
        assert locate(path) == Path(path)
    assert asked == ["org/name", "gpt2"]


@pytest.mark.parametrize(
    "name", ["hf:", "hf:a/b/c", "hf:../x", "hf:a b", "hf:/etc", "hf:" + "a" * 200]
)
def test_what_is_no_repository_is_never_asked_for(asked: list[str], name: str) -> None:
    with pytest.raises(InputError, match="names no repository"):
        locate(name)
    assert asked == []


def test_a_repository_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*_: object, **__: object) -> str:
        raise OSError("\nno network\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="hf:org/name cannot be fetched: no network\n"):
        hub.fetch("hf:org/name")


def test_a_missing_path_that_looks_like_a_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match="org/name is neither a file nor a folder here"
    ) as error:
        kilodelta.digest("org/name")
    assert "hf:org/name" in error.value.fix
    with pytest.raises(CheckpointError) as error:
        kilodelta.digest("org/name.safetensors")
    assert "hf:" not in error.value.fix


def test_open_model_says_how_the_hub_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    from kilodelta.models import open_model

    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="org/name is no model") as error:
        open_model("org/name")
    assert "hf:org/name" in error.value.fix
