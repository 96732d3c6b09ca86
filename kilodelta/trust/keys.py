"""Keys of a team: Ed25519 for devices, and P-256 beside it for `model_signing`.

Private keys are PKCS#8 PEM (RFC 5958), encrypted where a password is given; public keys are
SubjectPublicKeyInfo PEM (RFC 8410). Ed25519 is what a device can check in pure Python;
`model_signing` 1.1.1 takes NIST curves only, so a team has one of each.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, OutputError, require
from kilodelta.files import plain, staging
from kilodelta.rehearsal import begin_work

ED25519_SPKI = bytes.fromhex("302a300506032b6570032100")
"""The DER bytes before the 32 bytes of an Ed25519 public key (RFC 8410, section 4)."""
MAX_PEM = 64 << 10
_PEM = re.compile(
    rb"\s*-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=\s]+?)-----END PUBLIC KEY-----\s*\Z"
)


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """An Ed25519 public key: 32 raw bytes as 64 hexadecimal digits."""

    hex: str

    @property
    def keyid(self) -> str:
        """The name under which envelopes refer to the key: SHA-256 of its raw bytes, in hex."""
        return hashlib.sha256(bytes.fromhex(self.hex)).hexdigest()

    def securesystemslib(self) -> Any:
        """Return the key as `securesystemslib` takes it; needs no `cryptography`."""
        require("securesystemslib", extra="trust", why="check signatures")
        from securesystemslib.signer import SSlibKey

        return SSlibKey(self.keyid, "ed25519", "ed25519", {"public": self.hex})


@dataclass(frozen=True, kw_only=True)
class KeyFiles:
    """Where `keygen` wrote a team's keys."""

    private: Path
    public: Path
    p256_private: Path
    p256_public: Path
    keyid: str

    def to_json(self) -> dict[str, str]:
        """Return plain JSON values."""
        return {name: str(value) for name, value in vars(self).items()}


def keygen(name: str | os.PathLike[str], *, password: bytes | None = None) -> KeyFiles:
    """Make a team's keys: `NAME.key` and `NAME.pub`, and `NAME.p256.key` and `NAME.p256.pub`.

    Private keys are readable by their owner alone (mode 0600).

    Args:
        name: the path before the suffixes; none of the four files may exist.
        password: encrypts both private keys, or None.

    Raises:
        OutputError: one of the files exists or cannot be written.
        MissingPackageError: `cryptography` is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = keygen(Path(folder, "team"))
        >>> made.private.name, made.public.name
        ('team.key', 'team.pub')
    """
    require("cryptography", extra="sign", why="make keys")
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    place = Path(name)
    files = {
        suffix: place.with_name(place.name + suffix)
        for suffix in (".key", ".pub", ".p256.key", ".p256.pub")
    }
    for path in files.values():
        if path.exists() or path.is_symlink():
            raise OutputError(
                f"{path} exists already: a key is never overwritten", fix="give another name"
            )
    begin_work(*files.values(), encrypted="no" if password is None else "yes")
    signing = ed25519.Ed25519PrivateKey.generate()
    nist = ec.generate_private_key(ec.SECP256R1())
    _write_private(files[".key"], signing, password)
    _write_private(files[".p256.key"], nist, password)
    staging.write(files[".pub"], _public_pem(signing.public_key()))
    staging.write(files[".p256.pub"], _public_pem(nist.public_key()))
    return KeyFiles(
        private=files[".key"],
        public=files[".pub"],
        p256_private=files[".p256.key"],
        p256_public=files[".p256.pub"],
        keyid=read_public(files[".pub"]).keyid,
    )


def _write_private(path: Path, key: Any, password: bytes | None) -> None:
    from cryptography.hazmat.primitives import serialization as s

    encryption: Any = s.NoEncryption()
    if password:
        encryption = s.BestAvailableEncryption(password)
    data = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, encryption)
    # Opened with its final mode: a moment at 0644 is enough for a backup to read it.
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror}", fix="give a folder that you can write"
        ) from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _public_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    data: bytes = key.public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    return data


def read_public(path: str | os.PathLike[str]) -> PublicKey:
    """Read an Ed25519 public key from its PEM file; needs no `cryptography`.

    Raises:
        InputError: the file cannot be read, or holds another kind of key.
    """
    try:
        data = plain.read(Path(path), MAX_PEM, follow=True)
    except OSError as error:
        raise InputError(
            f"{os.fspath(path)} cannot be read: {error.strerror}", fix="give a .pub file"
        ) from None
    return parse_public(data, os.fspath(path))


def parse_public(data: bytes, where: str) -> PublicKey:
    """Read an Ed25519 public key from PEM bytes; `where` names them in errors.

    Raises:
        InputError: it is a private key, another kind of key, or no key.
    """
    if b"PRIVATE KEY" in data:
        raise InputError(
            f"{where} is a private key, which no device may have",
            fix="give the .pub file that lies beside it",
        )
    match = _PEM.match(data) if len(data) <= MAX_PEM else None
    try:
        der = base64.b64decode(b"".join(match.group(1).split()), validate=True) if match else b""
    except binascii.Error:
        der = b""
    if not der.startswith(ED25519_SPKI) or len(der) != len(ED25519_SPKI) + 32:
        raise InputError(
            f"{where} is no Ed25519 public key in PEM",
            fix="give the .pub file that kilodelta keygen wrote (not .p256.pub)",
        )
    return PublicKey(hex=der[len(ED25519_SPKI) :].hex())


def read_private(path: str | os.PathLike[str], password: bytes | None = None) -> Any:
    """Read a private key of any kind from PKCS#8 PEM, as `cryptography` holds it.

    Raises:
        InputError: the file cannot be read, is no private key, or the password is wrong or missing.
        MissingPackageError: `cryptography` is not installed.
    """
    require("cryptography", extra="sign", why="sign")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    where = os.fspath(path)
    try:
        data = plain.read(Path(path), MAX_PEM, follow=True)
    except OSError as error:
        raise InputError(
            f"{where} cannot be read: {error.strerror}", fix="give a .key file"
        ) from None
    try:
        return load_pem_private_key(data, password)
    except TypeError:
        # cryptography says so both for a missing and for a needless password
        raise InputError(
            f"{where} is encrypted and no password is given, or the reverse",
            fix="set KILODELTA_KEY_PASSWORD for an encrypted key, unset it for a plain one",
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(
            f"{where} is no private key in PKCS#8 PEM, or the password is wrong",
            fix="give the .key file that kilodelta keygen wrote",
        ) from None
