"""Fetch the newest release for a device from a TUF repository, by the reference client.

Source: the TUF specification 1.0, section 5, by `python-tuf`'s `Updater`. It walks the chain of
roots from the one that the device was given, and refuses metadata that are older than what it has
seen, expired, or not of one publication. It keeps a link and writes targets in place, so it works
in a separate folder, which nothing else reads; `apply` then takes the file by its own rules.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, OutputError, SignatureError, require
from kilodelta.files import plain, staging
from kilodelta.trust.envelope import SUFFIX
from kilodelta.trust.policy import Clock
from kilodelta.trust.statement import MAX_VERSION

WHY = "fetch releases"
MAX_RELEASE = 1 << 30
"""Bytes of one release that are fetched at most; a `.kd` with a whole head stays far below."""
SILENCE = 10
"""Seconds that a server may say nothing; urllib3 tries four times before the pull ends."""
MAX_METADATA = 5_000_000
"""Bytes of one role's metadata: python-tuf fetches no more, and reads what it kept whole."""
MAX_NAME = 200
HISTORY = "root_history"
_ROOT_LINK = re.compile(rf"{HISTORY}/[1-9][0-9]{{0,9}}\.root\.json\Z")


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """The newest release for a device: its file, its version, and whether it was fetched now."""

    path: Path
    version: int
    fetched: bool
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**vars(self), "path": str(self.path)}


def pull(
    folder: str | os.PathLike[str],
    url: str,
    *,
    root: bytes,
    task: str = "",
    kind: str = "",
    floor: int = 0,
) -> Pulled | None:
    """Fetch the release of the highest version that is for a task and a kind of device.

    Args:
        folder: the client's own folder, made where there is none; it holds what was seen before.
        url: the repository, `https://...`; plain `http://` is as safe but shows what is fetched.
        root: bytes of the first root, pinned when the device was provisioned.
        task: the one task to take; empty for any.
        kind: the device's kind; releases for other kinds are passed over.
        floor: a time in seconds since 1970 UTC that certainly has passed.

    Returns:
        The release, or None where the repository has none for this device.

    Raises:
        SignatureError: metadata are older than what was seen, expired, not of one publication,
            not signed by the repository's keys, or a release lacks its `.sig`.
        InputError: the URL is none, or the server does not answer.
        OutputError: the folder cannot be written, or another pull is under way.
        MissingPackageError: `tuf` is not installed.
    """
    require("tuf", extra="mirror", why=WHY)
    from tuf.ngclient import Updater
    from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher

    if not url.startswith(("https://", "http://")):
        raise InputError(f"{url!r:.200} is no URL", fix="give https://host/path of the repository")
    place = Path(folder)
    clock = Clock.floored(floor)
    with _locked(place), _explained(url):
        targets = place / "targets"
        updater = Updater(
            str(place / "metadata"),
            url.rstrip("/") + "/metadata/",
            str(targets),
            url.rstrip("/") + "/targets/",
            bootstrap=root,
            fetcher=Urllib3Fetcher(socket_timeout=SILENCE),
        )
        updater.refresh()
        _require_fresh(place / "metadata", clock)
        best = _newest(place / "metadata" / "targets.json", task, kind)
        if best is None:
            return None
        name, version = best
        fetched = [_fetch(updater, target) for target in (name, name + SUFFIX)]
        return Pulled(path=targets / name, version=version, fetched=any(fetched), note=clock.note)


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Hold the folder's lock: python-tuf does not support two clients at once on one folder."""
    require("filelock", extra="mirror", why=WHY)
    import filelock

    try:
        _require_plain(place)
        for folder in (place, place / "metadata", place / "targets"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with filelock.FileLock(place / ".lock", timeout=0):
            # What python-tuf writes metadata to before it names them stays after a kill.
            for path in (place / "metadata").glob("tmp*"):
                path.unlink()
            yield
    except filelock.Timeout:
        raise OutputError(f"another pull is at work in {place}", fix="try again") from None
    except PermissionError as error:
        raise OutputError(
            f"{place} cannot be written: {error.strerror}", fix="give a folder that you can write"
        ) from None


def _require_plain(place: Path) -> None:
    """Refuse what python-tuf would follow, wait for, or read whole in a folder of a stranger.

    It opens names as they are: a link leads it out of the folder, and a pipe makes it wait for
    ever. The one link that it makes is `root.json`, into its own history.

    Raises:
        OutputError: a folder or file is of another kind, or metadata are too large.
    """
    metadata = place / "metadata"
    for folder in (place, metadata, metadata / HISTORY, place / "targets"):
        if os.path.lexists(folder) and not plain.is_folder(folder):
            raise _foreign(folder, plain.kind(folder))
    for folder in (metadata, metadata / HISTORY):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path == metadata / HISTORY or _is_root_link(path):
                continue
            if not plain.is_file(path):
                raise _foreign(path, plain.kind(path))
            if path.lstat().st_size > MAX_METADATA:
                raise _foreign(path, f"has more than {MAX_METADATA} bytes")


def _is_root_link(path: Path) -> bool:
    return (
        path.is_symlink()
        and path.name == "root.json"
        and _ROOT_LINK.match(os.readlink(path)) is not None
    )


def _foreign(path: Path, what: str) -> OutputError:
    return OutputError(f"{path} {what}", fix="remove it: the next pull makes it anew")


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn python-tuf's families of errors into sentences."""
    from tuf.api import exceptions as e
    from urllib3.exceptions import HTTPError

    kinds: tuple[tuple[type[Exception], str, str], ...] = (
        (
            e.ExpiredMetadataError,
            "offers metadata that have expired: it may be frozen",
            "publish again: kilodelta publish REPO --key team.key",
        ),
        (
            e.BadVersionNumberError,
            "offers metadata older than what this device has seen",
            "restore the repository; versions only count up",
        ),
        (
            e.UnsignedMetadataError,
            "offers metadata that its keys have not signed",
            "check that the device was given this repository's 1.root.json",
        ),
        (
            e.LengthOrHashMismatchError,
            "offers files that are not of one publication",
            "try again; if it stays so, the mirror is damaged",
        ),
    )
    try:
        yield
    except e.RepositoryError as error:
        for kind, what, fix in kinds:
            if isinstance(error, kind):
                raise SignatureError(f"{url} {what}: {error}", fix=fix) from None
        raise SignatureError(
            f"{url} offers damaged metadata: {error}", fix="try again, or publish again"
        ) from None
    except OSError as error:  # of python-tuf's own writing: a full disk
        raise OutputError(
            f"what {url} offers cannot be written: {error.strerror or error}",
            fix="make room, and pull again",
        ) from None
    except (e.DownloadError, HTTPError) as error:
        told = str(error) or "no answer"
        raise InputError(
            f"{url} cannot be fetched from: {told}", fix="check the URL and the network"
        ) from None


def _require_fresh(metadata: Path, clock: Clock) -> None:
    """python-tuf judges by the system's clock; where that lies before the floor, judge again."""
    if not clock.note:
        return
    from tuf.api.metadata import Metadata

    now = datetime.fromtimestamp(clock.now, timezone.utc)
    for role in ("root", "timestamp", "snapshot", "targets"):
        signed: Any = Metadata.from_bytes((metadata / f"{role}.json").read_bytes()).signed
        if signed.is_expired(now):
            raise SignatureError(
                f"the mirror's {role} expired at {signed.expires:%Y-%m-%dT%H:%M:%SZ}; {clock.note}",
                fix="set the clock, and publish again",
            )


def _newest(targets: Path, task: str, kind: str) -> tuple[str, int] | None:
    """Name and version of the best release; entries that are not ours are passed over.

    A name becomes a file in the client's folder, so one that leads elsewhere is none of ours.
    """
    from tuf.api.metadata import Metadata

    signed: Any = Metadata.from_bytes(targets.read_bytes()).signed
    found = [
        (version, name)
        for name, target in signed.targets.items()
        if is_file_name(name)
        and not name.endswith(SUFFIX)
        and name + SUFFIX in signed.targets
        and (version := _fitting(target.unrecognized_fields.get("custom"), task, kind)) is not None
        and target.length <= MAX_RELEASE
    ]
    if not found:
        return None
    version, name = max(found)
    return name, version


def is_file_name(name: str) -> bool:
    """Return whether a target's name is one plain file name, which a device can write.

    Example:
        >>> is_file_name("task-7.kd"), is_file_name("../task-7.kd")
        (True, False)
    """
    whole = "/" not in name and "\\" not in name
    return whole and name.isprintable() and not name.startswith(".") and len(name) <= MAX_NAME


def _fitting(custom: Any, task: str, kind: str) -> int | None:
    """Return the version of an entry for this task and kind, or None."""
    if not isinstance(custom, dict):
        return None
    version, kinds = custom.get("version"), custom.get("kinds")
    if not isinstance(version, str) or not version.isascii() or not version.isdigit():
        return None
    if len(version) > 16 or int(version) > MAX_VERSION or not isinstance(kinds, list):
        return None
    if (task and custom.get("task") != task) or (kinds and kind not in kinds):
        return None
    return int(version)


def _fetch(updater: Any, name: str) -> bool:
    """Bring one target into the client's folder; return True if it was not there before."""
    info = updater.get_targetinfo(name)
    if info is None:
        raise SignatureError(f"the mirror lacks {name}", fix="publish again")
    # A pull that was killed after its target had its name has no successor that stages here.
    staging.sweep(Path(updater.target_dir))
    path = Path(updater.target_dir) / name
    if os.path.lexists(path) and not plain.is_file(path):
        raise _foreign(path, plain.kind(path))
    if updater.find_cached_target(info, str(path)) is not None:
        return False
    # python-tuf writes into the file that is there, whoever has it open, and part of one if the
    # disk is full.
    with staging.new_file(path) as stage:
        updater.download_target(info, str(stage))
    return True
