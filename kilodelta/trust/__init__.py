"""Sign releases, and decide on a device whether a signed release may be applied.

A release travels with `NAME.kd.sig`: a DSSE envelope over a statement of what the file is, for
which base, task and devices, in which order and until when. A device pins public keys, a
threshold, a task and a kind when it is provisioned, and refuses what they do not cover before
anything of the file is expanded. Checking an Ed25519 signature needs `securesystemslib` alone,
which is pure Python; making one needs `cryptography`. The threat model is `docs/security.md`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.trust.envelope import sign as sign
    from kilodelta.trust.envelope import verify as verify
    from kilodelta.trust.keys import PublicKey as PublicKey
    from kilodelta.trust.keys import keygen as keygen
    from kilodelta.trust.keys import read_public as read_public
    from kilodelta.trust.policy import Pins as Pins
    from kilodelta.trust.statement import Statement as Statement
    from kilodelta.trust.tuf_client import pull as pull
    from kilodelta.trust.tuf_repository import publish as publish

_WHERE = {
    "Pins": "kilodelta.trust.policy",
    "PublicKey": "kilodelta.trust.keys",
    "Statement": "kilodelta.trust.statement",
    "keygen": "kilodelta.trust.keys",
    "publish": "kilodelta.trust.tuf_repository",
    "pull": "kilodelta.trust.tuf_client",
    "read_public": "kilodelta.trust.keys",
    "sign": "kilodelta.trust.envelope",
    "verify": "kilodelta.trust.envelope",
}

__all__ = [
    "Pins",
    "PublicKey",
    "Statement",
    "keygen",
    "publish",
    "pull",
    "read_public",
    "sign",
    "verify",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
