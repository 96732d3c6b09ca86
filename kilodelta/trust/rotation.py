"""Change what a device pins, by a statement that enough of the keys pinned so far have signed.

The statement names the pins that it replaces by their digest, so an old one cannot be played again,
and one made for other pins does nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kilodelta.errors import InputError, SignatureError
from kilodelta.files import canonical, untrusted
from kilodelta.trust.envelope import checked_payload, signed_payload
from kilodelta.trust.policy import Pins, parse_pins
from kilodelta.trust.statement import MAX_VERSION

KIND = "kilodelta-trust-1"
PAYLOAD_TYPE = "application/vnd.kilodelta.trust+json"


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """New pins in place of old ones, and what the highest version shall count as, or None."""

    replaces: str
    pins: Pins
    highest: int | None = None

    def payload(self) -> bytes:
        """Return the bytes that are signed; numbers are texts."""
        pins = {**self.pins.to_json(), "threshold": str(self.pins.threshold)}
        facts = {
            "kind": KIND,
            "replaces": self.replaces,
            "pins": pins,
            "highest": "" if self.highest is None else str(self.highest),
        }
        return canonical.dumps(facts).encode("utf-8")


def pins_digest(pins: Pins) -> str:
    """Return `sha256:` and the digest of pins in their one spelling."""
    return f"sha256:{hashlib.sha256(canonical.dumps(pins.to_json()).encode()).hexdigest()}"


def sign_rotation(
    rotation: Rotation,
    keys: Sequence[str | os.PathLike[str]],
    *,
    password: bytes | None = None,
    before: bytes | None = None,
) -> bytes:
    """Sign a rotation and return the envelope's JSON.

    Args:
        rotation: what shall be pinned.
        keys: paths of private keys that are pinned so far.
        password: of encrypted keys, or None.
        before: an envelope of the same rotation, whose signatures are kept.

    Raises:
        InputError: a key is of another kind, or `before` is of another rotation.
    """
    return signed_payload(rotation.payload(), PAYLOAD_TYPE, keys, password=password, before=before)


def verified_rotation(data: bytes, pins: Pins) -> Rotation:
    """Return a rotation that enough of the present keys have signed, for exactly these pins.

    Raises:
        SignatureError: too few signatures, another kind of thing, or made for other pins.
    """
    payload, _ = checked_payload(data, PAYLOAD_TYPE, pins.keys, pins.threshold)
    try:
        rotation = _parse(payload)
    except ValueError as error:
        raise SignatureError(
            f"what was signed is no change of trust: {error}", fix="make it with kilodelta trust"
        ) from None
    if rotation.replaces != pins_digest(pins):
        raise SignatureError(
            "the change was made for other pins than this device has",
            fix="make it anew from this device's trust.json",
        )
    return rotation


def _parse(payload: bytes) -> Rotation:
    table = untrusted.table(
        canonical.loads(payload), "change", ("kind", "replaces", "pins", "highest")
    )
    if table["kind"] != KIND:
        raise untrusted.FieldError(f"its kind is {table['kind']!r:.80}, not {KIND}")
    pins: dict[str, Any] = dict(untrusted.mapping(table["pins"], "pins"))
    pins["threshold"] = _number(pins.get("threshold"), "threshold")
    highest = table["highest"]
    return Rotation(
        replaces=untrusted.digest(table["replaces"], "replaces"),
        pins=parse_pins(pins),
        highest=None if highest == "" else _number(highest, "highest"),
    )


def _number(value: Any, where: str) -> int:
    if not isinstance(value, str) or not value.isascii() or not value.isdigit() or len(value) > 16:
        raise untrusted.FieldError(f"{where} is {value!r:.40}, not a whole number as text")
    if int(value) > MAX_VERSION:
        raise untrusted.FieldError(f"{where} {value} is above {MAX_VERSION}")
    return int(value)


def changed(
    pins: Pins,
    *,
    add: Sequence[Any] = (),
    remove: Sequence[Any] = (),
    threshold: int | None = None,
) -> Pins:
    """Return pins with keys added and removed, checked as a device would read them.

    Args:
        pins: the present ones.
        add: public keys to pin.
        remove: public keys to pin no longer.
        threshold: how many must sign from now on; as before by default.

    Raises:
        InputError: a key to remove is not pinned, or the result cannot be met.
    """
    gone = {key.hex for key in remove}
    if strangers := gone - {key.hex for key in pins.keys}:
        raise InputError(
            f"key {sorted(strangers)[0][:16]}... is not pinned, so it cannot be removed",
            fix="kilodelta status --json lists the pinned keys",
        )
    kept = [key for key in pins.keys if key.hex not in gone]
    keys = dict.fromkeys([*kept, *add])
    made = Pins(
        keys=tuple(keys),
        threshold=pins.threshold if threshold is None else threshold,
        task=pins.task,
        kind=pins.kind,
    )
    try:
        return parse_pins(json.loads(json.dumps(made.to_json())))
    except untrusted.FieldError as error:
        raise InputError(f"these pins could not be met: {error}", fix="--threshold N") from None
