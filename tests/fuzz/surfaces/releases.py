"""Signatures beside releases, pinned keys, changes of trust, and the metadata of a mirror."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

from kilodelta.device import apply, modes, pull, release, trust
from kilodelta.device.update.trust import pins_from, write_pins
from kilodelta.trust import keygen, publish, read_public
from tests.doubles import numpy_device
from tests.fuzz.harness import Read, Surface
from tests.fuzz.mutations import bytes_changed, changed, json_changed, spelled

SIGNING = bytes(range(32))
"""The team's private key: the same in every run, so that inputs follow from their numbers."""


def _key() -> Any:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(SIGNING)


def _keys(folder: Path) -> tuple[Path, Path]:
    """Write the team's keys and return the private and the public one."""
    from cryptography.hazmat.primitives import serialization as s

    private, public = folder / "team.key", folder / "team.pub"
    private.write_bytes(
        _key().private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())
    )
    public.write_bytes(
        _key().public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


def _team(example: Path, trusted: Path) -> tuple[Path, Path]:
    """A device that pins the team's key, and a signed release beside it; returns the key files."""
    modes.OPENERS["patch"] = numpy_device.StandIn
    private, public = _keys(trusted)
    base = numpy_device.base(trusted / "base.safetensors")
    numpy_device.folder(example / "device", base)
    pins = pins_from([public], threshold=1, task="intents", kind="orin")
    assert pins is not None
    write_pins(example / "device" / "trust.json", pins)
    numpy_device.delta(base, 1).save(trusted / "raw.kd")
    release(
        base, trusted / "raw.kd", example / "task.kd", version=3, sign=[private], task="intents"
    )
    return private, public


def _signature(example: Path, trusted: Path) -> Read:
    _team(example, trusted)
    return lambda work: apply(work / "device", work / "task.kd")


def _rotation(example: Path, trusted: Path) -> Read:
    private, _ = _team(example, trusted)
    other = keygen(trusted / "other")
    (example / "new.pub").write_bytes(Path(other.public).read_bytes())
    change = example / "change.json"
    trust(example / "device", add=[other.public], by=[private], out=change)

    def read(work: Path) -> None:
        read_public(work / "new.pub")
        trust(work / "device", signed=work / "change.json")

    return read


def payload_changed(data: bytes, random: Random) -> bytes:
    """Change what was signed, and sign it again by the team's key."""
    envelope = json.loads(data)
    payload = base64.b64decode(envelope["payload"])
    value = changed(json.loads(payload), random)
    spellings: tuple[Callable[[Any], bytes], ...] = (
        lambda v: json.dumps(v, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        ),
        spelled,
    )
    payload = random.choice(spellings)(value)
    kind = envelope["payloadType"].encode()
    signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    envelope["payload"] = base64.b64encode(payload).decode()
    envelope["signatures"][0]["sig"] = base64.b64encode(_key().sign(signed)).decode()
    return json.dumps(envelope).encode()


def metadata_changed(data: bytes, random: Random) -> bytes:
    """Change a role's metadata, and sign it again by the mirror's key where that is possible."""
    if random.random() < 0.3:
        return json_changed(data, random)
    from securesystemslib.formats import encode_canonical

    table = json.loads(data)
    if "signed" not in table:
        return json_changed(data, random)
    table["signed"] = changed(table["signed"], random)
    try:
        text = encode_canonical(table["signed"])
        for signature in table["signatures"]:
            signature["sig"] = _key().sign(text.encode("utf-8")).hex()
    except Exception:  # floats and lone surrogates have no canonical spelling
        pass
    return spelled(table)


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def translate_path(self, path: str) -> str:
        """Serve a pipe as what is missing: opening it would keep this server, not the client."""
        place = super().translate_path(path)
        return place if not Path(place).is_fifo() else f"{place}/missing"


def _mirror(example: Path, trusted: Path) -> Read:
    """A device that has pulled once, and its mirror, served on loopback; both are damaged."""
    private, _ = _team(example, trusted)
    (example / "task.kd.sig").rename(trusted / "task.kd.sig")
    (example / "task.kd").rename(trusted / "task.kd")
    repository = example / "repo"
    publish([trusted / "task.kd"], repository, key=private)
    root = (repository / "metadata" / "1.root.json").read_bytes()
    (example / "device" / "root.json").write_bytes(root)
    served = example.parent / "work" / "repo"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"

    shutil.copytree(example, example.parent / "work")
    pull(example / "device", url)
    shutil.rmtree(example.parent / "work")
    return lambda work: pull(work / "device", url)


_NEEDS = ("cryptography", "securesystemslib")
SURFACES = (
    Surface(
        name="signature",
        make=_signature,
        mutate={
            "task.kd.sig": (json_changed, payload_changed, bytes_changed),
            "device/trust.json": (json_changed,),
        },
        needs=_NEEDS,
    ),
    Surface(
        name="trust-change",
        make=_rotation,
        mutate={
            "change.json": (json_changed, payload_changed, bytes_changed),
            "*.pub": (bytes_changed,),
        },
        needs=_NEEDS,
    ),
    Surface(
        name="tuf",
        make=_mirror,
        mutate={
            **{
                f"{folder}/{name}.json": (metadata_changed,)
                for folder in ("repo/metadata", "device/mirror/metadata")
                for name in (
                    "1.root",
                    "1.snapshot",
                    "1.targets",
                    "timestamp",
                    "root",
                    "snapshot",
                    "targets",
                )
            },
            "device/root.json": (metadata_changed,),
            "*.sig": (bytes_changed,),
            "*.kd": (bytes_changed,),
        },
        needs=(*_NEEDS, "tuf", "filelock"),
    ),
)
