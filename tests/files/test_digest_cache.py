"""Remembered digests are a hint: fast when they are right, never believed when they are odd."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kilodelta
from kilodelta.errors import BaseMismatchError
from kilodelta.files import digest_cache
from kilodelta.files.baseline import require_base
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.identity import Identity
from tests.support.making import model, write


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(digest_cache, "SETTLED_NS", 0)
    return write(tmp_path / "model.safetensors", model())


def cached(path: Path) -> Identity:
    return kilodelta.digest(path, cached=True)


def remembered(path: Path) -> dict[str, str] | None:
    (shard,) = Checkpoint.open(path).shards
    return digest_cache.load(shard)


def cache_file() -> Path:
    (found,) = digest_cache.folder().glob("digests/*.json")
    return found


def alter(**changes: Any) -> None:
    table = json.loads(cache_file().read_text())
    cache_file().write_text(json.dumps({**table, **changes}))


def test_a_changed_file_is_hashed_again(path: Path) -> None:
    first = kilodelta.digest(path)
    assert remembered(path) == first.tensors
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # the same size and times
    assert cached(path).root != first.root


def test_a_remembered_digest_is_used_only_where_it_is_asked_for(path: Path) -> None:
    true = kilodelta.digest(path)
    wrong = {**true.tensors, "count": "sha256:" + "0" * 64}
    alter(tensors=wrong)
    assert cached(path).tensors == wrong
    assert kilodelta.digest(path) == true
    assert cached(path) == true  # what was computed is remembered in its place


def test_what_is_remembered_is_not_written_again(path: Path) -> None:
    """Writing waits for the disk; every task of a fleet hashes the base."""
    kilodelta.digest(path)
    before = cache_file().stat()
    kilodelta.digest(path)
    assert cache_file().stat().st_ino == before.st_ino
    alter(tensors={})
    assert remembered(path) is None
    true = kilodelta.digest(path)
    assert remembered(path) == true.tensors


@pytest.mark.parametrize(
    "junk",
    ["", "[]", "{", '{"key": 1}', '{"key": [1], "tensors": 2}', "\xff", "[" * 100_000, "1" * 9_999],
    ids=range(8),
)
def test_a_damaged_cache_is_computed_anew(path: Path, junk: str) -> None:
    true = kilodelta.digest(path)
    cache_file().write_text(junk, encoding="latin-1")
    assert cached(path) == true


@pytest.mark.parametrize("text", ["zz", "sha256:" + "0" * 63, "sha256:" + "G" * 64, 7, None])
def test_what_is_no_digest_is_computed_anew(path: Path, text: Any) -> None:
    true = kilodelta.digest(path)
    alter(tensors={**true.tensors, "count": text})
    assert cached(path) == true


def test_names_that_are_not_the_files_are_computed_anew(path: Path) -> None:
    true = kilodelta.digest(path)
    for tensors in (
        {**true.tensors, "more": "sha256:" + "0" * 64},
        {n: t for n, t in true.tensors.items() if n != "count"},
        {},
    ):
        alter(tensors=tensors)
        assert cached(path) == true


def test_a_cache_that_others_can_write_is_not_read(path: Path) -> None:
    true = kilodelta.digest(path)
    alter(tensors={**true.tensors, "count": "sha256:" + "0" * 64})
    place = cache_file().parent
    assert place.stat().st_mode & 0o077 == 0
    place.chmod(0o777)
    assert cached(path) == true
    place.chmod(0o700)
    elsewhere = place.rename(place.with_name("elsewhere"))
    place.symlink_to(elsewhere)
    assert cached(path) == true


def test_links_and_pipes_in_the_cache_are_not_opened(path: Path) -> None:
    true = kilodelta.digest(path)
    alter(tensors={**true.tensors, "count": "sha256:" + "0" * 64})
    place = cache_file()
    outside = place.rename(path.parent / "outside.json")
    place.symlink_to(outside)
    assert remembered(path) is None
    place.unlink()
    os.mkfifo(place)
    assert cached(path) == true


def test_a_cache_that_cannot_be_written_does_not_matter(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path.parent / "file").write_text("")
    monkeypatch.setenv("KILODELTA_CACHE", str(path.parent / "file"))
    assert kilodelta.digest(path) == cached(path)


def test_a_file_just_written_is_not_remembered(tmp_path: Path) -> None:
    place = write(tmp_path / "model.safetensors", model())
    kilodelta.digest(place)
    assert remembered(place) is None


def expected(identity: Identity) -> Any:
    return SimpleNamespace(
        name="x", root=identity.root, tensors=len(identity.tensors), fingerprints=b""
    )


def test_a_stale_hint_never_refuses_the_right_base(path: Path) -> None:
    true = kilodelta.digest(path)
    alter(tensors={**true.tensors, "count": "sha256:" + "0" * 64})
    assert require_base(Checkpoint.open(path), expected(true), cached=True) == true


def test_a_base_changed_through_a_map_is_refused_without_the_hint(path: Path) -> None:
    true = kilodelta.digest(path)
    times = path.stat()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as pages:
        pages[-1] ^= 1
        # The kernel writes dirty pages and new times back when it likes; here it has not yet.
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(BaseMismatchError):
            require_base(Checkpoint.open(path), expected(true))
