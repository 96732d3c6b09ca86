"""Files that strangers may have put there: regular ones only, bounded, and without waiting."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest

from kilodelta.errors import CheckpointError, FileError
from kilodelta.files import plain
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.plain import NotPlainError
from tests.support.making import folder, model, write


def why(path: Path, flags: int = os.O_RDONLY) -> str:
    with pytest.raises(NotPlainError) as caught:
        plain.open_file(path, flags)
    return str(caught.value.strerror)


def test_what_is_no_regular_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    assert why(tmp_path / "link") == "is a link"
    assert why(tmp_path / "pipe") == "is a pipe"
    assert why(tmp_path) == "is a folder"
    assert why(tmp_path / "socket") == "is a device or a socket"
    assert why(Path("/dev/zero")) == "is a device or a socket"
    assert plain.unplain(tmp_path) is not None
    with pytest.raises(FileNotFoundError):
        plain.open_file(tmp_path / "absent")
    assert plain.read(tmp_path / "link", 9, follow=True) == b"x"
    with pytest.raises(NotPlainError, match="is a pipe"):
        plain.open_file(tmp_path / "pipe", follow=True)


def test_writing_goes_through_no_second_name(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("v")
    os.link(victim, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(victim)
    os.mkfifo(tmp_path / "pipe")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    assert why(tmp_path / "hard", flags) == "has another name, a hard link"
    assert why(tmp_path / "soft", flags) == "is a link"
    assert why(tmp_path / "pipe", flags) == "is a pipe"
    (tmp_path / "loose").symlink_to(tmp_path / "new")
    assert why(tmp_path / "loose", flags) == "is a link"
    assert not (tmp_path / "new").exists()
    descriptor = plain.open_file(tmp_path / "own", flags)
    os.write(descriptor, b"1")
    os.close(descriptor)
    assert (tmp_path / "own").read_bytes() == b"1"


def test_a_link_that_appears_between_the_look_and_the_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text("s")
    (tmp_path / "file").write_text("x")
    original = os.open

    def swap(path: Path, *more: int) -> int:
        (tmp_path / "file").unlink()
        (tmp_path / "file").symlink_to("secret")
        return original(path, *more)

    monkeypatch.setattr(os, "open", swap)
    assert why(tmp_path / "file") == "is a link"


def test_a_device_that_appears_is_closed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    original, opened = os.open, []

    def swap(path: Path, *more: int) -> int:
        opened.append(original("/dev/zero", *more))
        return opened[-1]

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(NotPlainError):
        plain.open_file(tmp_path / "file")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_reading_stops_at_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert plain.read(tmp_path / "file", 5) == b"12345"
    with pytest.raises(NotPlainError, match="has more than 4 bytes"):
        plain.read(tmp_path / "file", 4)
    with (
        pytest.raises(FileError, match=r"file has more than 4 bytes"),
        plain.explained(tmp_path / "file", FileError),
    ):
        plain.read(tmp_path / "file", 4)


def cache(place: Path) -> Path:
    """A Hugging Face cache folder with one snapshot of links to blobs; returns the snapshot."""
    blobs, snapshot = place / "blobs", place / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write(blobs / "1f", model())
    (snapshot / "model.safetensors").symlink_to("../../blobs/1f")
    (blobs / "2e").write_text("{}")
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/2e")
    return snapshot


def test_a_hugging_face_cache_links_to_its_own_blobs(tmp_path: Path) -> None:
    snapshot = cache(tmp_path / "models--org--name")
    assert Checkpoint.open(snapshot).names == Checkpoint.open(tmp_path / "models--org--name").names
    assert plain.read_model_file(snapshot / "sub" / "config.json") == b"{}"
    assert plain.is_model_file(snapshot / "model.safetensors")
    absolute = snapshot / "absolute"
    absolute.symlink_to((tmp_path / "models--org--name" / "blobs" / "2e").resolve())
    assert plain.read_model_file(absolute) == b"{}"
    # The cache itself may lie behind a link of the user's.
    (tmp_path / "hub").symlink_to(tmp_path / "models--org--name")
    assert Checkpoint.open(tmp_path / "hub").names


def test_no_other_link_of_a_model_folder_is_followed(tmp_path: Path) -> None:
    snapshot = cache(tmp_path / "models--org--name")
    secret = tmp_path / "secret"
    secret.write_text("s")
    other = cache(tmp_path / "models--other--name")
    blobs = tmp_path / "models--org--name" / "blobs"
    (blobs / "link").symlink_to(secret)
    (blobs / "deep").mkdir()
    (blobs / "deep" / "x").write_text("x")
    for number, target in enumerate(
        (
            str(secret),
            "../../../secret",
            "../../blobs/../../secret",
            "../../blobs/link",
            "../../blobs/deep/x",
            "../../blobs/deep",
            "../../blobs/..",
            "../../blobs/absent",
            str(other / "model.safetensors"),
            "/etc/hostname",
        )
    ):
        link = snapshot / str(number)
        link.symlink_to(target)
        assert not plain.is_model_file(link), target
        with pytest.raises(OSError, match=r"is a (link|folder)|No such file"):
            plain.read_model_file(link)
    plainly = folder(tmp_path / "plain", model())
    (plainly / "blobs").mkdir()
    (plainly / "model.safetensors").rename(plainly / "blobs" / "1f")
    (plainly / "model.safetensors").symlink_to("blobs/1f")
    with pytest.raises(CheckpointError, match=r"model.safetensors is a link"):
        Checkpoint.open(plainly)


def test_a_model_folder_of_pipes_and_devices(tmp_path: Path) -> None:
    place = folder(tmp_path / "m", model(), shards=2)
    index = place / "model.safetensors.index.json"
    text = index.read_bytes()
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        kept = (place / name).rename(tmp_path / "kept")
        os.mkfifo(place / name)
        with pytest.raises(CheckpointError, match="is a pipe"):
            Checkpoint.open(place)
        (place / name).unlink()
        (place / name).symlink_to("/dev/zero")
        with pytest.raises(CheckpointError, match="is a link"):
            Checkpoint.open(place)
        (place / name).unlink()
        kept.rename(place / name)
    index.write_bytes(text + b" " * plain.INDEX_LIMIT)
    with pytest.raises(CheckpointError, match="has more than"):
        Checkpoint.open(place)
    index.write_bytes(text)
    assert Checkpoint.open(place).names == tuple(sorted(model()))


@pytest.mark.parametrize(
    "text", ["/etc", "..", "../snapshots/abc", "", ".", "absent", "a/b", "\xff\xfe", "x" * 2000]
)
def test_a_cache_names_a_snapshot_inside_itself(tmp_path: Path, text: str) -> None:
    cache(tmp_path / "hub")
    (tmp_path / "hub" / "refs").mkdir()
    (tmp_path / "hub" / "refs" / "main").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"refs/main"):
        Checkpoint.open(tmp_path / "hub")
    (tmp_path / "hub" / "refs" / "main").write_text("abc\n")
    assert Checkpoint.open(tmp_path / "hub").names


def test_a_digest_is_of_bytes_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"one")
    (tmp_path / "link").symlink_to(folder / "a.png")
    assert plain.digest(folder / "a.png") == plain.digest(tmp_path / "link")
    assert plain.digest(folder / "a.png") == f"sha256:{hashlib.sha256(b'one').hexdigest()}"
    with pytest.raises(plain.NotPlainError):
        plain.sha256(tmp_path / "link")
    seen = {plain.digest(folder)}
    (folder / "a.png").write_bytes(b"two")  # of the same size
    seen.add(plain.digest(folder))
    (folder / "a.png").rename(folder / "b.png")
    seen.add(plain.digest(folder))
    assert len(seen) == 3
