"""A second signature that `model_signing` 1.1.1 verifies as its own: a Sigstore bundle.

Source: the in-toto Statement v1 of https://model_signing/signature/v1.0 in a DSSE envelope in a
Sigstore bundle v0.3, as model_signing 1.1.1 reads them. It states the file by its SHA-256 and
carries our statement's facts as further fields of the predicate, which that tool signs over and
ignores. It takes NIST curves only, so a team's P-256 key signs this; no device ever reads it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.files import canonical
from kilodelta.trust.keys import read_private
from kilodelta.trust.statement import Statement

MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE = "https://model_signing/signature/v1.0"
SUFFIX = ".sigstore.json"


def bundle_path(file: str | os.PathLike[str]) -> Path:
    """Return where the bundle of a `.kd` file lies."""
    place = Path(file)
    return place.with_name(place.name + SUFFIX)


def model_bundle(
    statement: Statement,
    name: str,
    key: str | os.PathLike[str],
    *,
    password: bytes | None = None,
) -> bytes:
    """Sign a statement so that `model_signing verify key FILE --signature BUNDLE` accepts it.

    Args:
        statement: what is signed; its facts travel in the predicate.
        name: the file's name, which that tool shows and does not compare.
        key: a P-256, P-384 or P-521 private key.
        password: of an encrypted key, or None.

    Returns:
        The bundle's JSON. ECDSA is randomised: two bundles of one file differ.

    Raises:
        InputError: the key is of another kind.
        MissingPackageError: `cryptography` is not installed.
    """
    private = read_private(key, password)
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec

    sizes: dict[int, Any] = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.key_size not in sizes:
        raise InputError(
            f"{os.fspath(key)} is no P-256 key", fix="give NAME.p256.key of kilodelta keygen"
        )
    payload = canonical.dumps(_in_toto(statement, name)).encode("utf-8")
    kind = PAYLOAD_TYPE.encode("utf-8")
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    signature = private.sign(signed, ec.ECDSA(sizes[private.key_size]))
    pem = private.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    bundle = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(pem).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode("ascii"),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode("ascii"), "keyid": ""}],
        },
    }
    return json.dumps(bundle, indent=1).encode("utf-8") + b"\n"


def _in_toto(statement: Statement, name: str) -> dict[str, Any]:
    raw = bytes.fromhex(statement.file.removeprefix("sha256:"))
    return {
        "_type": "https://in-toto.io/Statement/v1",
        # The subject's digest is of the list of the files' raw digests, not of the file.
        "subject": [{"name": name, "digest": {"sha256": hashlib.sha256(raw).hexdigest()}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [{"name": ".", "algorithm": "sha256", "digest": raw.hex()}],
            "kilodelta": json.loads(statement.payload()),
        },
    }
