"""What a device pins when it is provisioned, and what that lets pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kilodelta.errors import SignatureError
from kilodelta.files import untrusted
from kilodelta.trust.keys import PublicKey
from kilodelta.trust.statement import Statement, seconds

VERSION = 1
MAX_KEYS = 32
_KEYS = ("version", "keys", "threshold", "task", "kind")


@dataclass(frozen=True, kw_only=True)
class Pins:
    """The keys a device believes, how many must sign, and what it is for."""

    keys: tuple[PublicKey, ...]
    threshold: int = 1
    task: str = ""
    """The one task that this device takes; empty for any."""

    kind: str = ""
    """What kind of device this is; empty for a device that only takes releases for every kind."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, as they are kept in the device folder."""
        return {
            "version": VERSION,
            "keys": [key.hex for key in self.keys],
            "threshold": self.threshold,
            "task": self.task,
            "kind": self.kind,
        }


def parse_pins(value: Any) -> Pins:
    """Read pins from JSON that nobody vouches for.

    Raises:
        FieldError: a field is not what it must be.
    """
    table = untrusted.table(value, "trust", _KEYS)
    if table["version"] != VERSION or table["version"] is True:
        raise untrusted.FieldError(f"trust version {table['version']!r:.40} is not {VERSION}")
    keys = untrusted.listed(table["keys"], "keys", _key)
    threshold = untrusted.whole(table["threshold"], "threshold")
    if not 0 < len(keys) <= MAX_KEYS or len({key.hex for key in keys}) != len(keys):
        raise untrusted.FieldError(f"keys are not 1 to {MAX_KEYS} different ones")
    if not 1 <= threshold <= len(keys):
        raise untrusted.FieldError(f"threshold {threshold} is not 1 to {len(keys)}")
    return Pins(
        keys=keys,
        threshold=threshold,
        task=untrusted.text(table["task"], "task"),
        kind=untrusted.text(table["kind"], "kind"),
    )


def _key(value: Any, where: str) -> PublicKey:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise untrusted.FieldError(f"{where} is no Ed25519 key of 64 hexadecimal digits")
    return PublicKey(hex=value)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The time that expiry is judged by, in seconds since 1970 UTC, and how it was come by.

    A device's clock can stand at 1970 or run backwards, and then nothing would ever expire. So it
    never counts as earlier than the latest time that this device has seen.
    """

    now: int
    note: str = ""

    @classmethod
    def floored(cls, floor: int, system: float | None = None) -> Clock:
        """Return the system's time, or the floor where the system's lies before it."""
        seen = int(time.time() if system is None else system)
        if seen >= floor:
            return cls(now=seen)
        late = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(floor))
        return cls(now=floor, note=f"the clock lies before {late}, a time this device has seen")


def require_allowed(
    statement: Statement,
    pins: Pins,
    *,
    clock: Clock,
    base: str,
    file: str,
    result: str,
    version: int,
) -> None:
    """Let a verified statement pass, or say by name what does not hold.

    Args:
        statement: what enough pinned keys have signed.
        pins: what this device is for.
        clock: the time that expiry is judged by.
        base: root of this device's base.
        file: digest of the file at hand, `sha256:...` over all its bytes.
        result: root of the merged targets that the file at hand promises.
        version: the version inside the file at hand.

    Raises:
        SignatureError: another file, base, result, version, task or kind; not yet valid, or
            expired.
    """
    held: Sequence[tuple[str, object, object]] = (
        ("file", statement.file, file),
        ("base", statement.base, base),
        ("result", statement.result, result),
        ("version", statement.version, version),
    )
    for name, said, there in held:
        if said != there:
            raise SignatureError(
                f"the signature is of another {name}: it states {said}, the file has {there}",
                fix="fetch the .kd and the .sig of one release",
            )
    if pins.task and statement.task != pins.task:
        raise SignatureError(
            f"the release is for task {statement.task!r}, this device is for {pins.task!r}",
            fix="apply a release of this task",
        )
    if statement.kinds and pins.kind not in statement.kinds:
        own = pins.kind or "of no kind"
        raise SignatureError(
            f"the release is for {', '.join(statement.kinds)}, this device is {own}",
            fix="apply a release for this kind of device: kilodelta release --for",
        )
    if statement.not_before and clock.now < seconds(statement.not_before):
        raise SignatureError(
            f"the release is valid from {statement.not_before} on", fix=_clock_fix(clock)
        )
    if statement.not_after and clock.now >= seconds(statement.not_after):
        raise SignatureError(
            f"the release expired at {statement.not_after}",
            fix="apply a newer release; " + _clock_fix(clock),
        )


def _clock_fix(clock: Clock) -> str:
    return (
        f"check this device's clock ({clock.note})" if clock.note else "check this device's clock"
    )
