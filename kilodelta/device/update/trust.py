"""`kilodelta trust` and `kilodelta pull`: whom a device believes, where releases come from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kilodelta.device.folder.change import changing
from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.errors import DeviceError, InputError, SignatureError
from kilodelta.files import plain, staging
from kilodelta.rehearsal import begin_work
from kilodelta.trust.envelope import MAX_ENVELOPE
from kilodelta.trust.keys import read_public
from kilodelta.trust.policy import Pins, parse_pins
from kilodelta.trust.rotation import (
    Rotation,
    changed,
    pins_digest,
    sign_rotation,
    verified_rotation,
)
from kilodelta.trust.tuf_client import Pulled
from kilodelta.trust.tuf_client import pull as fetch
from kilodelta.trust.tuf_repository import MAX_ROOT

MIRROR = "mirror"
"""The mirror client's own folder in the device folder; nothing else looks into it."""


@dataclass(frozen=True, kw_only=True)
class Trusted:
    """What a device pins after a change, or the signed change that was written to a file."""

    pins: Pins
    highest: int
    written: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "trust": self.pins.to_json(),
            "highest": self.highest,
            "written": None if self.written is None else str(self.written),
        }


def pins_from(
    trust: Sequence[str | os.PathLike[str]], *, threshold: int, task: str, kind: str
) -> Pins | None:
    """Check what a device shall pin when it is provisioned; None where it shall pin nothing.

    Args:
        trust: paths of public keys.
        threshold: how many of them must sign a release.
        task: the one task to take; empty for any.
        kind: the device's kind.

    Raises:
        InputError: a task or kind without keys, something that is no public key, or a threshold
            that cannot be met.
    """
    if not trust:
        if task or kind or threshold != 1:
            raise InputError(
                "a task, a kind and a threshold are pinned with keys, and there are none",
                fix="add --trust team.pub (kilodelta keygen makes one)",
            )
        return None
    keys = dict.fromkeys(read_public(path) for path in trust)
    made = Pins(keys=tuple(keys), threshold=threshold, task=task, kind=kind)
    try:
        return parse_pins(made.to_json())
    except ValueError as error:
        raise InputError(
            f"these pins make no sense: {error}", fix="see --trust, --threshold"
        ) from None


def provision(root: Path, pins: Pins | None, mirror_root: bytes | None) -> None:
    """Write what a new device folder pins.

    Raises:
        OutputError: it cannot be written.
    """
    if pins is not None:
        write_pins(root / "trust.json", pins)
    if mirror_root is not None:
        staging.write(root / "root.json", mirror_root)


def write_pins(path: Path, pins: Pins) -> None:
    """Write `trust.json`, in full or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    staging.write(path, json.dumps(pins.to_json(), indent=1).encode() + b"\n")


def trust(
    folder: str | os.PathLike[str],
    *,
    add: Sequence[str | os.PathLike[str]] = (),
    remove: Sequence[str | os.PathLike[str]] = (),
    threshold: int | None = None,
    reset_version: int | None = None,
    by: Sequence[str | os.PathLike[str]] = (),
    signed: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    password: bytes | None = None,
) -> Trusted:
    """Change the keys that a device pins, signed by enough of those that it pins now.

    Either make the change here (`add`, `remove`, `threshold`, `reset_version`, `by`), or apply one
    that was made elsewhere (`signed`). With `out` the change is written to that file instead of
    being applied: all devices that pin the same can then apply it.

    Args:
        folder: a device folder, or a copy of one that pins the same.
        add: public keys to pin.
        remove: public keys to pin no longer.
        threshold: how many must sign from now on.
        reset_version: what the highest version shall count as, after a release with a version far
            too high.
        by: private keys of pinned keys.
        signed: a file that an earlier call wrote.
        out: write the signed change here and change nothing.
        password: of encrypted keys.

    Raises:
        DeviceError: no device folder, or one that pins nothing.
        InputError: nothing is to be changed, or options that do not go together.
        SignatureError: too few of the pinned keys signed it.
        LockedError: another command is changing the folder.
        OutputError: it cannot be written.
    """
    device = DeviceFolder.open(folder)
    pins = device.pins
    if pins is None:
        raise DeviceError(
            f"{device.root} pins no keys, so nobody can sign a change",
            fix="provision it: kilodelta bundle BASE -o device --trust team.pub",
        )
    if signed is not None and (add or remove or by or threshold or reset_version is not None):
        raise InputError("a signed change says all by itself", fix="give --signed alone")
    if signed is not None:
        data = _read_signed(signed)
    else:
        data = _made(pins, add, remove, threshold, reset_version, by, password)
    rotation = verified_rotation(data, pins)
    begin_work(
        Path(out or device.trust), keys=len(rotation.pins.keys), must_sign=rotation.pins.threshold
    )
    if out is not None:
        staging.write(Path(out), data)
        return Trusted(pins=rotation.pins, highest=device.state.highest, written=Path(out))
    with changing(device) as change:
        # Looked at again under the lock: another change may have come between.
        rotation = verified_rotation(data, device.pins or pins)
        after = change.before
        if rotation.highest is not None:
            after = replace(after, sequence=change.sequence, highest=rotation.highest)
        change.note("trust", pins=pins_digest(rotation.pins), highest=after.highest)
        write_pins(device.trust, rotation.pins)
        change.commit(replace(after, sequence=change.sequence), "committed")
    return Trusted(pins=rotation.pins, highest=after.highest)


def _made(
    pins: Pins,
    add: Sequence[str | os.PathLike[str]],
    remove: Sequence[str | os.PathLike[str]],
    threshold: int | None,
    reset_version: int | None,
    by: Sequence[str | os.PathLike[str]],
    password: bytes | None,
) -> bytes:
    if not (add or remove or threshold or reset_version is not None):
        raise InputError(
            "nothing is to be changed", fix="--add, --remove, --threshold, --reset-version"
        )
    if not by:
        raise InputError("a pinned key must sign the change", fix="add --by team.key")
    new = changed(
        pins,
        add=[read_public(path) for path in add],
        remove=[read_public(path) for path in remove],
        threshold=threshold,
    )
    rotation = Rotation(replaces=pins_digest(pins), pins=new, highest=reset_version)
    return sign_rotation(rotation, by, password=password)


def _read_signed(path: str | os.PathLike[str]) -> bytes:
    fix = "give a file that kilodelta trust -o wrote"
    try:
        data = plain.read(Path(path), MAX_ENVELOPE, follow=True)
    except OSError as problem:
        raise InputError(
            f"{os.fspath(path)} cannot be read: {problem.strerror or problem}", fix=fix
        ) from None
    if not data.lstrip().startswith(b"{"):
        raise SignatureError(f"{os.fspath(path)} is no signed change of pins", fix=fix)
    return data


def pull(
    folder: str | os.PathLike[str], url: str, *, root: str | os.PathLike[str] | None = None
) -> Pulled | None:
    """Fetch the newest release for a device from a mirror; it is not applied.

    Args:
        folder: the device folder.
        url: of the repository that `kilodelta publish` wrote.
        root: the repository's `1.root.json`, for a device that was provisioned without one.

    Returns:
        The release, in the device folder's `mirror/`; None where there is none for this device.

    Raises:
        DeviceError: no device folder.
        InputError: no root is pinned and none is given, or the server does not answer.
        SignatureError: the mirror offers what it may not.
        OutputError: the folder cannot be written.
        MissingPackageError: `tuf` is not installed.
    """
    device = DeviceFolder.open(folder)
    pinned = _mirror_root(device, root)
    pins = device.pins
    place = device.root / MIRROR
    if os.path.lexists(place) and not plain.is_folder(place):
        raise DeviceError(f"{place} {plain.kind(place)}", fix="remove it")
    return fetch(
        place,
        url,
        root=pinned,
        task=pins.task if pins else "",
        kind=pins.kind if pins else "",
        floor=device.state.seen,
    )


def _mirror_root(device: DeviceFolder, root: str | os.PathLike[str] | None) -> bytes:
    pinned = os.path.lexists(device.mirror_root)
    if pinned and root is not None:
        raise InputError(f"{device.mirror_root} is pinned already", fix="leave --root out")
    path = device.mirror_root if pinned else None if root is None else Path(root)
    if path is None:
        raise InputError(
            "this device pins no mirror",
            fix="give --root 1.root.json, or provision it: kilodelta bundle --mirror 1.root.json",
        )
    try:
        return plain.read(path, MAX_ROOT, follow=not pinned)
    except OSError as problem:
        raise InputError(f"{path} {problem.strerror or problem}", fix="give 1.root.json") from None
