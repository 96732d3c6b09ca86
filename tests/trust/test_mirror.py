"""The mirror: a static TUF repository, and a client that refuses what a mirror may not do."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tuf")
pytest.importorskip("cryptography")
from tuf.api.metadata import Metadata

from kilodelta.errors import InputError, KiloDeltaError, OutputError, SignatureError
from kilodelta.trust import keygen, sign
from kilodelta.trust.envelope import write_signature
from kilodelta.trust.statement import stated
from kilodelta.trust.tuf_client import Pulled, pull
from kilodelta.trust.tuf_repository import _signer, first_root, publish
from tests.support.mirrors import mirror_of


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return keygen(tmp_path_factory.mktemp("keys") / "team")


def release(folder: Path, key: Any, version: int, task: str = "intents", kinds: Any = ()) -> Path:
    """Bytes that stand for a `.kd`, signed: a mirror does not look into them."""
    file = folder / f"{task}-{version}.kd"
    file.write_bytes(f"release {version} of {task}".encode())
    statement = stated(
        {
            "file": "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest(),
            "base": "sha256:" + "cd" * 32,
            "result": "sha256:" + "ef" * 32,
            "version": version,
            "task": task,
            "kinds": tuple(kinds),
        }
    )
    write_signature(file, sign(statement, [key.private]))
    return file


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder served as it is, on a loopback port."""
    with mirror_of(tmp_path / "repo") as url:
        yield tmp_path / "repo", url


def client(tmp_path: Path, served: tuple[Path, str], **more: Any) -> Pulled | None:
    root = first_root(served[0] / "metadata" / "1.root.json")
    return pull(tmp_path / "client", served[1], root=root, **more)


def test_what_is_published_is_pulled(tmp_path: Path, key: Any, served: tuple[Path, str]) -> None:
    file = release(tmp_path, key, 7)
    made = publish([file], served[0], key=key.private)
    assert (made.version, made.timestamp) == (1, 1)
    assert made.targets == ("intents-7.kd", "intents-7.kd.sig")
    got = client(tmp_path, served, task="intents")
    assert got is not None
    assert (got.version, got.fetched) == (7, True)
    assert got.path.read_bytes() == file.read_bytes()
    assert Path(f"{got.path}.sig").read_bytes() == Path(f"{file}.sig").read_bytes()
    again = client(tmp_path, served, task="intents")
    assert again is not None
    assert not again.fetched


def test_versions_tasks_and_kinds_are_chosen_by(
    tmp_path: Path, key: Any, served: tuple[Path, str]
) -> None:
    publish([release(tmp_path, key, 9)], served[0], key=key.private)
    more = [
        release(tmp_path, key, 10),
        release(tmp_path, key, 12, kinds=["orin"]),
        release(tmp_path, key, 30, task="names"),
    ]
    assert publish(more, served[0], key=key.private).version == 2
    for given, version in (
        ({"task": "intents"}, 10),
        ({"task": "intents", "kind": "orin"}, 12),
        ({"task": "names"}, 30),
        ({}, 30),
    ):
        got = client(tmp_path, served, **given)
        assert got is not None
        assert got.version == version
    assert client(tmp_path, served, task="other") is None


def test_a_rollback_is_refused(tmp_path: Path, key: Any, served: tuple[Path, str]) -> None:
    publish([release(tmp_path, key, 1)], served[0], key=key.private)
    shutil.copytree(served[0], tmp_path / "old")
    publish([release(tmp_path, key, 2)], served[0], key=key.private)
    assert client(tmp_path, served) is not None
    shutil.rmtree(served[0])
    shutil.copytree(tmp_path / "old", served[0])
    with pytest.raises(SignatureError, match="older than what this device has seen"):
        client(tmp_path, served)


def test_a_frozen_mirror_is_refused(
    tmp_path: Path, key: Any, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kilodelta.trust import tuf_repository

    long_ago = datetime.now(timezone.utc).replace(microsecond=0) - timedelta(days=40)
    monkeypatch.setattr(tuf_repository, "_later", lambda days: long_ago + timedelta(days=days))
    publish([release(tmp_path, key, 1)], served[0], key=key.private)
    with pytest.raises(SignatureError, match="expired: it may be frozen"):
        client(tmp_path, served)


def test_a_clock_that_stands_still_does_not_help_a_frozen_mirror(
    tmp_path: Path, key: Any, served: tuple[Path, str]
) -> None:
    """The device has seen a time after the timestamp's end, and its clock lies before that."""
    publish([release(tmp_path, key, 1)], served[0], key=key.private)
    later = int((datetime.now(timezone.utc) + timedelta(days=60)).timestamp())
    with pytest.raises(SignatureError, match="the mirror's timestamp expired"):
        client(tmp_path, served, floor=later)


def test_other_bytes_and_mixtures_are_refused(
    tmp_path: Path, key: Any, served: tuple[Path, str]
) -> None:
    publish([release(tmp_path, key, 1)], served[0], key=key.private)
    [target] = served[0].glob("targets/*.kd")
    data = target.read_bytes()
    target.write_bytes(data[:-1] + b"!")
    with pytest.raises(SignatureError, match="not of one publication"):
        client(tmp_path, served)
    target.write_bytes(data)
    assert client(tmp_path, served) is not None
    other = tmp_path / "other"
    publish([], other, key=keygen(tmp_path / "stranger").private)
    shutil.copy(other / "metadata" / "timestamp.json", served[0] / "metadata")
    with pytest.raises(SignatureError, match="keys have not signed"):
        client(tmp_path, served)


def test_a_publication_that_is_killed_did_not_happen(
    tmp_path: Path, key: Any, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before each file in turn: clients see the old release, the next one goes on."""
    from kilodelta.files import staging

    publish([release(tmp_path, key, 1)], served[0], key=key.private)
    real = staging.write
    new = release(tmp_path, key, 2)
    for number in range(5):
        left = iter(range(number))

        def dying(path: Path, data: bytes, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr(staging, "write", dying)
            with pytest.raises(KeyboardInterrupt):
                publish([new], served[0], key=key.private)
        got = client(tmp_path, served)
        assert got is not None
        assert got.version == 1
    made = publish([new], served[0], key=key.private)
    assert made.version == 2
    got = client(tmp_path, served)
    assert got is not None
    assert got.version == 2


def test_what_is_not_ours_is_not_published(tmp_path: Path, key: Any) -> None:
    file = release(tmp_path, key, 1)
    stranger = keygen(tmp_path / "stranger")
    repo = tmp_path / "repo"
    with pytest.raises(SignatureError, match="signed by 0"):
        publish([file], repo, key=stranger.private)
    assert not repo.exists()
    publish([file], repo, key=key.private)
    with pytest.raises(OutputError, match="another key's repository"):
        publish([], repo, key=stranger.private)
    file.write_bytes(b"other bytes")
    with pytest.raises(SignatureError, match="of another file"):
        publish([file], repo, key=key.private)
    Path(f"{file}.sig").unlink()
    with pytest.raises(SignatureError, match="has no signature"):
        publish([file], repo, key=key.private)
    with pytest.raises(InputError, match="no Ed25519 key"):
        publish([], repo, key=key.p256_private)
    with pytest.raises(InputError, match="400 days"):
        publish([], repo, key=key.private, days=400)
    metadata = repo / "metadata"
    (metadata / "old.root.json").write_bytes(b"the user's own")  # no number: passed over
    for data in (b"{}", (metadata / "1.root.json").read_bytes()):
        (metadata / "timestamp.json").write_bytes(data)
        with pytest.raises(OutputError, match="damaged"):
            publish([], repo, key=key.private)


@pytest.mark.parametrize(
    "name", ["metadata", "targets", ".lock", "metadata/timestamp.json", "metadata/2.targets.json"]
)
@pytest.mark.parametrize("put", [lambda p, _: os.mkfifo(p), lambda p, o: p.symlink_to(o)])
def test_a_repository_of_a_stranger_leads_nowhere(
    tmp_path: Path, key: Any, name: str, put: Any
) -> None:
    repo, outside = tmp_path / "repo", tmp_path / "outside"
    publish([], repo, key=key.private)
    outside.write_text("the user's own")
    place = repo / name
    if place.exists():
        place.rename(tmp_path / "aside")
    put(place, outside)
    with pytest.raises(OutputError, match=r"is a (link|pipe)"):
        publish([release(tmp_path, key, 2)], repo, key=key.private)
    assert outside.read_text() == "the user's own"


def test_a_folder_of_something_else_becomes_no_repository(tmp_path: Path, key: Any) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"base is no repository and holds config\.json"):
        publish([], base, key=key.private)
    assert [place.name for place in base.iterdir()] == ["config.json"]


def test_a_file_that_is_not_there_is_not_called_unsigned(tmp_path: Path, key: Any) -> None:
    with pytest.raises(InputError, match=r"nothing\.kd does not exist"):
        publish([tmp_path / "nothing.kd"], tmp_path / "repo", key=key.private)


def test_two_publications_at_once(tmp_path: Path, key: Any) -> None:
    import filelock

    repo = tmp_path / "repo"
    repo.mkdir()
    with filelock.FileLock(repo / ".lock"), pytest.raises(OutputError, match="another command"):
        publish([], repo, key=key.private)


@pytest.mark.parametrize("url", ["file:///tmp/x", "repo", "ftp://host/x"])
def test_odd_urls(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no URL"):
        pull(tmp_path / "client", url, root=b"")


def test_a_server_that_is_gone(tmp_path: Path, key: Any) -> None:
    made = publish([], tmp_path / "repo", key=key.private)
    with pytest.raises(InputError, match="cannot be fetched from"):
        pull(tmp_path / "client", "http://127.0.0.1:9", root=made.root.read_bytes())
    with pytest.raises(InputError, match="is no root"):
        first_root(tmp_path / "repo" / "metadata" / "timestamp.json")
    with pytest.raises(KiloDeltaError):
        pull(tmp_path / "client2", "http://127.0.0.1:9", root=b"{}")


def test_a_full_disk_while_pulling_is_said_and_leaves_nothing(
    tmp_path: Path, key: Any, served: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuf.ngclient import Updater

    publish([release(tmp_path, key, 7)], served[0], key=key.private)

    def half(_: Any, info: Any, place: str) -> str:
        Path(place).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Updater, "download_target", half)
        with pytest.raises(OutputError, match="cannot be written: No space left"):
            client(tmp_path, served)
    assert list((tmp_path / "client" / "targets").iterdir()) == []
    (tmp_path / "client" / "metadata" / "tmpabc").write_bytes(b"what a killed pull left")
    got = client(tmp_path, served)
    assert got is not None
    assert got.fetched
    assert not (tmp_path / "client" / "metadata" / "tmpabc").exists()


def test_what_a_pull_left_that_was_killed_at_its_end_goes_with_the_next(
    tmp_path: Path, key: Any, served: tuple[Path, str]
) -> None:
    publish([release(tmp_path, key, 7)], served[0], key=key.private)
    assert client(tmp_path, served) is not None
    targets = tmp_path / "client" / "targets"
    whole = sorted(targets.iterdir())
    killed = (
        "import os, sys\nfrom kilodelta.files import staging\n"
        "with staging.new_file(__import__('pathlib').Path(sys.argv[1]) / 'late') as stage:\n"
        "    stage.write_bytes(b'x')\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", killed, str(targets)], check=False)
    assert len(list(targets.iterdir())) == len(whole) + 1
    got = client(tmp_path, served)
    assert got is not None
    assert not got.fetched
    assert sorted(targets.iterdir()) == whole


def test_a_server_that_says_nothing_is_a_sentence(
    tmp_path: Path, key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish([release(tmp_path, key, 7)], tmp_path / "repo", key=key.private)
    root = first_root(tmp_path / "repo" / "metadata" / "1.root.json")
    monkeypatch.setattr("kilodelta.trust.tuf_client.SILENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InputError, match="cannot be fetched from"):
            pull(tmp_path / "client", url, root=root)


def _to_outside(path: Path, outside: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(outside)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "put", "words"),
    [
        ("metadata", _to_outside, "metadata is a link"),
        ("targets", _to_outside, "targets is a link"),
        ("metadata/root_history", _to_outside, "root_history is a link"),
        ("metadata/timestamp.json", lambda p, _: _pipe(p), r"timestamp\.json is a pipe"),
        ("metadata/root.json", lambda p, o: _link(p, o / "tmpfile"), r"root\.json is a link"),
        ("metadata/snapshot.json", lambda p, _: _huge(p), "more than 5000000 bytes"),
        ("targets/intents-7.kd", lambda p, _: _pipe(p), r"intents-7\.kd is a pipe"),
        ("targets/intents-7.kd", lambda p, o: _link(p, o / "tmpfile"), r"intents-7\.kd is a link"),
    ],
)
def test_a_clients_folder_of_a_stranger_leads_nowhere(
    tmp_path: Path, key: Any, served: tuple[Path, str], name: str, put: Any, words: str
) -> None:
    publish([release(tmp_path, key, 7)], served[0], key=key.private)
    assert client(tmp_path, served) is not None
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tmpfile").write_text("the user's own")
    put(tmp_path / "client" / name, outside)
    with pytest.raises(OutputError, match=words):
        client(tmp_path, served)
    assert [path.name for path in outside.iterdir()] == ["tmpfile"]
    assert (outside / "tmpfile").read_text() == "the user's own"


def _link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def _huge(path: Path) -> None:
    os.truncate(path, 5_000_001)


@pytest.mark.parametrize(
    "name", ["../out.kd", "a/b.kd", "/tmp/a.kd", "..\\out.kd", ".out.kd", "a\nb.kd"]
)
def test_the_name_of_a_target_leads_nowhere(
    tmp_path: Path, key: Any, served: tuple[Path, str], name: str
) -> None:
    """Whoever holds the mirror's key names the files that a device writes."""
    publish([release(tmp_path, key, 7)], served[0], key=key.private)
    file = served[0] / "metadata" / "1.targets.json"
    metadata: Any = Metadata.from_bytes(file.read_bytes())
    for old in ("intents-7.kd", "intents-7.kd.sig"):
        target = metadata.signed.targets.pop(old)
        target.path = old.replace("intents-7.kd", name)
        metadata.signed.targets[target.path] = target
    metadata.sign(_signer(key.private, None)[0])
    file.write_bytes(metadata.to_bytes())
    assert client(tmp_path, served) is None
    assert list((tmp_path / "client" / "targets").iterdir()) == []


def test_a_name_that_devices_pass_over_is_not_published(tmp_path: Path, key: Any) -> None:
    file = release(tmp_path, key, 7)
    odd = file.rename(tmp_path / ".odd.kd")
    Path(f"{file}.sig").rename(f"{odd}.sig")
    with pytest.raises(InputError, match="no name for a device"):
        publish([odd], tmp_path / "repo", key=key.private)
