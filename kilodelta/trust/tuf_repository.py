"""Publish releases in a static TUF repository: a folder of files for any web server.

Source: the TUF specification 1.0 (https://theupdateframework.github.io/specification/latest/), by
`python-tuf`. A mirror, or whoever breaks into it, can then serve neither other bytes, nor old
ones, nor a mixture, nor the same ones for ever: a client refuses all four. All keys are Ed25519:
one key of a kind that an older client does not know would end that client for good.

::

    repo/metadata/  1.root.json, 4.targets.json, 4.snapshot.json, timestamp.json
    repo/targets/   <sha256>.task-7.kd, <sha256>.task-7.kd.sig
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, OutputError, SignatureError, require
from kilodelta.files import plain, staging
from kilodelta.rehearsal import begin_work
from kilodelta.trust.envelope import read_signature, signature_path, verify
from kilodelta.trust.keys import PublicKey, read_private
from kilodelta.trust.statement import Statement
from kilodelta.trust.tuf_client import is_file_name

ROLES = ("root", "timestamp", "snapshot", "targets")
ROOT_DAYS = 365
TIMESTAMP_DAYS = 30
"""For how long a device believes that there is nothing newer: publish at least as often."""
MAX_ROOT = 512_000
"""Bytes of a root that are read, as python-tuf does."""
WHY = "publish releases"
_ROOT = re.compile(r"[0-9]{1,18}\.root\.json")


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a repository holds after a publication."""

    repository: Path
    version: int
    """Of targets and snapshot, counted up by one each time."""

    timestamp: int
    expires: str
    targets: tuple[str, ...]
    root: Path
    """The first root's file: what a device is given when it is provisioned."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        shown = {n: str(v) if isinstance(v, Path) else v for n, v in vars(self).items()}
        return {**shown, "targets": list(self.targets)}


def publish(
    files: Sequence[str | os.PathLike[str]],
    repository: str | os.PathLike[str],
    *,
    key: str | os.PathLike[str],
    password: bytes | None = None,
    days: int = TIMESTAMP_DAYS,
) -> Published:
    """Add signed releases to a repository, which is made where there is none.

    Without files the timestamp is renewed: do that before it expires. Everything new is written
    before the timestamp, which is the only file that a client starts from, so a publication that
    is killed midway is one that did not happen; the next one goes on from what stands.

    Args:
        files: `.kd` files, each with its `.sig` beside it, signed by `key` among others.
        repository: a folder, served as it is.
        key: the Ed25519 private key of all four roles.
        password: of an encrypted key, or None.
        days: until the timestamp expires.

    Raises:
        InputError: the key is of another kind, or days make no sense.
        SignatureError: a file has no signature by this key, or another file's.
        OutputError: the repository is another key's, is damaged, or cannot be written.
        MissingPackageError: `tuf` is not installed.
    """
    require("tuf", extra="mirror", why=WHY)
    if not 1 <= days <= ROOT_DAYS:
        raise InputError(f"{days} days make no sense", fix=f"give 1 to {ROOT_DAYS}")
    signer, public = _signer(key, password)
    place = Path(repository)
    _require_plain(place)
    releases = [_release(Path(file), public) for file in files]
    if (place / "metadata" / "1.root.json").exists():
        _require_own(place / "metadata", public)
    begin_work(place, releases=len(releases), days=days)
    with _locked(place):
        metadata = place / "metadata"
        (place / "targets").mkdir(parents=True, exist_ok=True)
        metadata.mkdir(exist_ok=True)
        if not (metadata / "1.root.json").exists():
            _write_root(metadata, signer)
        _require_own(metadata, public)
        return _add(place, releases, signer, days)


def _signer(key: str | os.PathLike[str], password: bytes | None) -> tuple[Any, PublicKey]:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.signer import CryptoSigner

    private = read_private(key, password)
    if not isinstance(private, Ed25519PrivateKey):
        raise InputError(
            f"{os.fspath(key)} is no Ed25519 key", fix="give NAME.key of kilodelta keygen"
        )
    raw = private.public_key().public_bytes(s.Encoding.Raw, s.PublicFormat.Raw)
    public = PublicKey(hex=raw.hex())
    return CryptoSigner(private, public.securesystemslib()), public


def _release(file: Path, public: PublicKey) -> tuple[Path, Statement]:
    """Read a file's signature and hold it against the bytes at hand, before anything is written."""
    if not is_file_name(file.name):
        raise InputError(
            f"{file.name!r:.200} is no name for a device to write",
            fix="rename it: printable, at most 200 characters, no dot in front",
        )
    if not os.path.lexists(file):
        raise InputError(f"{file} does not exist", fix="check the path")
    data = read_signature(file)
    if data is None:
        raise SignatureError(
            f"{file} has no signature: {signature_path(file).name} is missing",
            fix="kilodelta release ... --sign team.key",
        )
    statement, _ = verify(data, [public], 1)
    try:
        with plain.open_reader(file, follow=True) as opened:
            digest = "sha256:" + hashlib.sha256(opened.read()).hexdigest()
    except OSError as error:
        raise InputError(
            f"{file} cannot be read: {error.strerror}", fix="give a .kd file"
        ) from None
    if digest != statement.file:
        raise SignatureError(
            f"{signature_path(file)} is of another file than {file.name}",
            fix="publish the .kd and the .sig of one release",
        )
    return file, statement


def _locked(place: Path) -> Any:
    """Hold the lock of one publication; a killed one frees it."""
    require("filelock", extra="mirror", why=WHY)
    import filelock

    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(place / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise OutputError(
            f"{place} is being published to by another command", fix="try again"
        ) from None
    except OSError as error:
        raise OutputError(
            f"{place} cannot be written: {error.strerror}", fix="give a folder that you can write"
        ) from None
    return lock


def _later(days: int) -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=days)


def _write_root(metadata: Path, signer: Any) -> None:
    from tuf.api.metadata import Metadata, Root

    root = Root(consistent_snapshot=True, expires=_later(ROOT_DAYS))
    for role in ROLES:
        root.add_key(signer.public_key, role)
    signed = Metadata(root)
    signed.sign(signer)
    staging.write(metadata / "1.root.json", signed.to_bytes())


def _require_plain(place: Path) -> None:
    """Refuse a repository in which a link or a pipe stands where files are read and written.

    It may be a copy that somebody else sent: publishing would write where its links lead.
    """
    odd: list[Path] = []
    for name, is_right in (
        ("metadata", plain.is_folder),
        ("targets", plain.is_folder),
        (".lock", plain.is_file),
    ):
        path = place / name
        if not os.path.lexists(path):
            continue
        if not is_right(path):
            odd.append(path)
        elif name != ".lock":
            staging.sweep(path)  # of a publish that was killed; those of one that runs stay
            with os.scandir(path) as entries:
                others = [Path(e.path) for e in entries if not e.is_file(follow_symlinks=False)]
            odd += [entry for entry in others if not staging.is_stage(entry)]
    if odd:
        raise OutputError(
            f"{odd[0]} {plain.kind(odd[0])}", fix="remove it; publish itself makes none"
        )
    if place.is_dir() and not (place / "metadata" / "1.root.json").exists():
        foreign = sorted(
            {entry.name for entry in place.iterdir()} - {"metadata", "targets", ".lock"}
        )
        if foreign:
            raise OutputError(
                f"{place} is no repository and holds {foreign[0]}",
                fix="give the repository's folder, or a new one",
            )


def _require_own(metadata: Path, public: PublicKey) -> None:
    roots = [path for path in metadata.glob("*.root.json") if _ROOT.fullmatch(path.name)]
    newest = max(roots, key=lambda path: int(path.name.split(".")[0]))
    keyids = _read(newest, "root").roles["timestamp"].keyids
    if public.keyid not in keyids:
        raise OutputError(
            f"{metadata.parent} is another key's repository",
            fix="publish with the key it began with",
        )


def _read(path: Path, role: str) -> Any:
    """Return the signed part of one role's metadata.

    Raises:
        OutputError: it cannot be read, or is another role's.
    """
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata

    try:
        signed: Any = Metadata.from_bytes(plain.read(path, plain.INDEX_LIMIT)).signed
        if signed.type == role:
            return signed
    except (OSError, RepositoryError):
        pass
    raise OutputError(
        f"{path} is damaged, so its version cannot be counted on",
        fix="restore it: a lower version would be refused by every device",
    )


def _add(
    place: Path, releases: Sequence[tuple[Path, Statement]], signer: Any, days: int
) -> Published:
    from tuf.api.metadata import Metadata, MetaFile, Snapshot, Targets, Timestamp

    metadata = place / "metadata"
    stands = metadata / "timestamp.json"
    old_time = _read(stands, "timestamp") if stands.exists() else None
    version = old_time.snapshot_meta.version if old_time is not None else 0
    targets = Targets(expires=_later(ROOT_DAYS))
    if version:
        targets.targets = dict(_read(metadata / f"{version}.targets.json", "targets").targets)
    for file, statement in releases:
        for path in (file, signature_path(file)):
            targets.targets[path.name] = _target(place, path, statement)
    version += 1
    targets.version = version
    snapshot = Snapshot(version=version, expires=_later(ROOT_DAYS))
    snapshot.meta["targets.json"] = MetaFile(version)
    timestamp = Timestamp(
        version=1 if old_time is None else old_time.version + 1, expires=_later(days)
    )
    timestamp.snapshot_meta.version = version
    for name, signed in (
        (f"{version}.targets.json", targets),
        (f"{version}.snapshot.json", snapshot),
        ("timestamp.json", timestamp),
    ):
        one = Metadata(signed)
        one.sign(signer)
        staging.write(metadata / name, one.to_bytes())
    return Published(
        repository=place,
        version=version,
        timestamp=timestamp.version,
        expires=timestamp.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        targets=tuple(sorted(targets.targets)),
        root=metadata / "1.root.json",
    )


def _target(place: Path, file: Path, statement: Statement) -> Any:
    """Copy one file under its hashed name and describe it; numbers in `custom` are texts."""
    from tuf.api.metadata import TargetFile

    with plain.open_reader(file, follow=True) as opened:
        data = opened.read()
    target = TargetFile.from_data(file.name, data, ["sha256"])
    target.unrecognized_fields["custom"] = {
        "task": statement.task,
        "version": str(statement.version),
        "kinds": list(statement.kinds),
    }
    staging.write(place / "targets" / f"{target.hashes['sha256']}.{file.name}", data)
    return target


def first_root(path: str | os.PathLike[str]) -> bytes:
    """Read a repository's first root, for pinning it when a device is provisioned.

    Raises:
        InputError: it is no TUF root.
        MissingPackageError: `tuf` is not installed.
    """
    require("tuf", extra="mirror", why="read a mirror's root")
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    try:
        data = plain.read(Path(path), MAX_ROOT, follow=True)
        if not isinstance(Metadata[Root].from_bytes(data).signed, Root):
            raise RepositoryError("no root")
    except (OSError, RepositoryError):
        raise InputError(
            f"{os.fspath(path)} is no root of a TUF repository",
            fix="give metadata/1.root.json of what kilodelta publish wrote",
        ) from None
    return data
