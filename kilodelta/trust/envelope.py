"""Signatures over statements: DSSE envelopes, by `securesystemslib`.

Source: https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md. An envelope carries the
signed bytes and any number of signatures; a reader asks for k of n keys, and reads the statement
from the very bytes that were verified, never from a second copy.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, OutputError, SignatureError, require
from kilodelta.files import staging
from kilodelta.files.untrusted import FieldError
from kilodelta.trust.keys import PublicKey, parse_public, read_private
from kilodelta.trust.statement import Statement, parse

PAYLOAD_TYPE = "application/vnd.kilodelta.release+json"
SUFFIX = ".sig"
"""`task-7.kd` is signed by `task-7.kd.sig`, which lies beside it."""
MAX_ENVELOPE = 256 << 10
MAX_SIGNATURES = 32


def signature_path(file: str | os.PathLike[str]) -> Path:
    """Return where the signature of a `.kd` file lies."""
    place = Path(file)
    return place.with_name(place.name + SUFFIX)


def sign(
    statement: Statement,
    keys: Sequence[str | os.PathLike[str]],
    *,
    password: bytes | None = None,
    before: bytes | None = None,
) -> bytes:
    """Sign a statement with Ed25519 keys and return the envelope's JSON.

    Args:
        statement: what is signed.
        keys: paths of private keys.
        password: of all encrypted keys among them, or None.
        before: an envelope of the same statement, whose signatures are kept (k of n signers who
            do not meet sign one after the other).

    Raises:
        InputError: a key is of another kind, the same key twice, or `before` is of another
            statement.
        MissingPackageError: `cryptography` or `securesystemslib` is not installed.

    Example:
        >>> import json, tempfile
        >>> from kilodelta.trust.keys import keygen
        >>> digests = {name: "sha256:" + "0" * 64 for name in ("file", "base", "result")}
        >>> release = Statement(**digests, version=7, task="intents")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     key = keygen(Path(folder, "team"))
        ...     envelope = sign(release, [key.private])
        >>> len(json.loads(envelope)["signatures"])
        1
    """
    return signed_payload(statement.payload(), PAYLOAD_TYPE, keys, password=password, before=before)


def signed_payload(
    payload: bytes,
    payload_type: str,
    keys: Sequence[str | os.PathLike[str]],
    *,
    password: bytes | None = None,
    before: bytes | None = None,
) -> bytes:
    """Sign any payload with Ed25519 keys and return the envelope's JSON.

    Args:
        payload: the bytes to sign.
        payload_type: what they are; it is signed as well.
        keys, password, before: as for `sign`.

    Raises:
        InputError: a key is of another kind, or `before` is of another payload.
        MissingPackageError: `cryptography` or `securesystemslib` is not installed.
    """
    require("securesystemslib", extra="sign", why="sign")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    envelope = Envelope(payload, payload_type, {})
    if before is not None:
        envelope = _parsed(before)
        if (envelope.payload, envelope.payload_type) != (payload, payload_type):
            raise InputError(
                "the signature file is of another release than the one to sign",
                fix="remove the old .sig, or sign the file it belongs to",
            )
    for path in keys:
        private = read_private(path, password)
        if not isinstance(private, Ed25519PrivateKey):
            raise InputError(
                f"{os.fspath(path)} is no Ed25519 key",
                fix="give NAME.key of kilodelta keygen (NAME.p256.key is for model_signing)",
            )
        envelope.sign(CryptoSigner(private, _public_of(private).securesystemslib()))
    return json.dumps(envelope.to_dict(), sort_keys=True, indent=1).encode("utf-8") + b"\n"


def _public_of(private: Any) -> PublicKey:
    from cryptography.hazmat.primitives import serialization as s

    pem = private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    return parse_public(pem, "the public half")


def verify(data: bytes, keys: Sequence[PublicKey], threshold: int) -> tuple[Statement, list[str]]:
    """Return the statement of an envelope that enough of the keys have signed, and their key ids.

    Args:
        data: the envelope's JSON, not trusted.
        keys: the keys that count; a key given twice counts once.
        threshold: how many different ones must have signed.

    Raises:
        SignatureError: it is no envelope, too few of the keys signed it, or it states another
            kind of thing.
        MissingPackageError: `securesystemslib` is not installed.

    Example:
        >>> import tempfile
        >>> from kilodelta.trust.keys import keygen, read_public
        >>> digests = {name: "sha256:" + "0" * 64 for name in ("file", "base", "result")}
        >>> release = Statement(**digests, version=7, task="intents")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     key = keygen(Path(folder, "team"))
        ...     envelope, public = sign(release, [key.private]), read_public(key.public)
        >>> statement, signers = verify(envelope, [public], threshold=1)
        >>> statement.version, signers == [key.keyid]
        (7, True)
    """
    payload, signed = checked_payload(data, PAYLOAD_TYPE, keys, threshold)
    try:
        return parse(payload), signed
    except FieldError as error:
        raise SignatureError(
            f"what was signed is no statement of a release: {error}",
            fix="sign it with kilodelta release --sign",
        ) from None


def checked_payload(
    data: bytes, payload_type: str, keys: Sequence[PublicKey], threshold: int
) -> tuple[bytes, list[str]]:
    """Return an envelope's payload that enough of the keys have signed, and their key ids.

    Args:
        data: the envelope's JSON, not trusted.
        payload_type: what the payload must be.
        keys: the keys that count; a key given twice counts once.
        threshold: how many different ones must have signed.

    Raises:
        SignatureError: it is no envelope, of another type, or too few of the keys signed it.
        MissingPackageError: `securesystemslib` is not installed.
    """
    envelope = _parsed(data)
    if envelope.payload_type != payload_type:
        raise SignatureError(
            f"the signature is over {envelope.payload_type!r:.80}, not over {payload_type}",
            fix="fetch the signature that belongs to this file",
        )
    unique = {key.keyid: key for key in keys}
    signed = [key.keyid for key in unique.values() if _has_signed(envelope, key)]
    if len(signed) < threshold:
        raise SignatureError(
            f"signed by {len(signed)} of the {len(unique)} pinned keys; {threshold} must sign",
            fix="have it signed by the keys that this device pins: kilodelta release --sign",
        )
    payload: bytes = envelope.payload
    return payload, signed


def _has_signed(envelope: Any, key: PublicKey) -> bool:
    """Check one key at a time, so that a bad signature cannot hide another signer's good one."""
    from securesystemslib.exceptions import UnverifiedSignatureError

    signature = envelope.signatures.get(key.keyid)
    if signature is None:
        return False
    try:
        key.securesystemslib().verify_signature(signature, envelope.pae())
    except UnverifiedSignatureError:
        return False
    return True


def _parsed(data: bytes) -> Any:
    """Read an envelope, bounded in bytes and signatures; every oddity is one kind of error."""
    require("securesystemslib", extra="trust", why="check signatures")
    from securesystemslib.dsse import Envelope

    wrong = SignatureError(
        "the signature file is damaged: it is no DSSE envelope",
        fix="fetch the .sig again, or sign again with kilodelta release --sign",
    )
    if len(data) > MAX_ENVELOPE:
        raise wrong
    try:
        value = json.loads(data.decode("utf-8"))
        if not isinstance(value["payloadType"], str) or len(value["signatures"]) > MAX_SIGNATURES:
            raise wrong
        for signature in value["signatures"]:
            if not all(isinstance(signature[name], str) for name in ("keyid", "sig")):
                raise wrong
        return Envelope.from_dict(value)
    except SignatureError:
        raise
    # securesystemslib passes on what its parts raise on odd values; all of it means "damaged".
    except Exception:
        raise wrong from None


def read_signature(file: str | os.PathLike[str]) -> bytes | None:
    """Return the bytes of the signature beside a `.kd` file, at most one more than is allowed.

    None where there is none.

    Raises:
        SignatureError: there is something, and it is no regular file that can be read.
    """
    place = signature_path(file)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(place, flags)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SignatureError(
            f"{place} cannot be read: {error.strerror}", fix="put a regular .sig file there"
        ) from None
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise SignatureError(f"{place} is no regular file", fix="fetch the .sig again")
        with os.fdopen(handle, "rb", closefd=False) as opened:
            return opened.read(MAX_ENVELOPE + 1)
    finally:
        os.close(handle)


def write_signature(file: str | os.PathLike[str], data: bytes) -> Path:
    """Write an envelope beside a `.kd` file, whole or not at all, and return its path.

    Raises:
        OutputError: it cannot be written.
    """
    place = signature_path(file)
    if place.is_symlink():
        raise OutputError(f"{place} is a link", fix="remove it")
    staging.write(place, data)
    return place
