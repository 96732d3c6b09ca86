"""Signed releases: keys, statements, envelopes, what pins let pass; and the real libraries."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kilodelta.errors import InputError, OutputError, SignatureError
from kilodelta.files.untrusted import FieldError
from kilodelta.trust import Pins, Statement, keygen, read_public, sign, verify
from kilodelta.trust.envelope import (
    MAX_ENVELOPE,
    PAYLOAD_TYPE,
    read_signature,
    signature_path,
    write_signature,
)
from kilodelta.trust.model_bundle import model_bundle
from kilodelta.trust.policy import Clock, parse_pins, require_allowed
from kilodelta.trust.statement import MAX_VERSION, parse, seconds, stated, time_of
from tests.support.processes import ROOT

pytest.importorskip("cryptography")
pytest.importorskip("securesystemslib")

DIGEST = "sha256:" + "ab" * 32
FACTS: dict[str, Any] = {
    "file": DIGEST,
    "base": "sha256:" + "cd" * 32,
    "result": "sha256:" + "ef" * 32,
    "version": 7,
    "task": "intents",
    "kinds": ("orin", "rtx"),
    "not_before": "2026-01-01T00:00:00Z",
    "not_after": "2027-03-01T00:00:00Z",
    "tool": "kilodelta 0.2.0",
}
STATEMENT = Statement(**FACTS)
NOW = seconds("2026-12-01T00:00:00Z")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("keys")
    return [keygen(folder / name) for name in ("one", "two", "three")]


def publics(team: list[Any]) -> list[Any]:
    return [read_public(one.public) for one in team]


def test_private_keys_are_their_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    made = keygen(tmp_path / "team", password=b"secret")
    for path in (made.private, made.p256_private):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"BEGIN ENCRYPTED PRIVATE KEY" in path.read_bytes()
    with pytest.raises(OutputError, match="never overwritten"):
        keygen(tmp_path / "team")
    with pytest.raises(InputError, match="encrypted and no password"):
        sign(STATEMENT, [made.private])
    with pytest.raises(InputError, match="password is wrong"):
        sign(STATEMENT, [made.private], password=b"other")
    assert sign(STATEMENT, [made.private], password=b"secret")


def test_a_public_key_is_read_without_cryptography(team: list[Any]) -> None:
    """The 32 bytes of RFC 8410, section 10.1: a known key, typed in."""
    pem = Path(team[0].public).with_name("rfc.pub")
    pem.write_text(
        "-----BEGIN PUBLIC KEY-----\n"
        "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n"
        "-----END PUBLIC KEY-----\n"
    )
    assert read_public(pem).hex == (
        "19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1"
    )
    for odd, words in (
        (team[0].private, "is a private key"),
        (team[0].p256_public, "no Ed25519 public key"),
        (team[0].public.with_name("none"), "cannot be read"),
    ):
        with pytest.raises(InputError, match=words):
            read_public(odd)


def test_a_statement_has_one_spelling_and_numbers_as_text() -> None:
    payload = STATEMENT.payload()
    assert b'"version":"7"' in payload
    assert parse(payload) == STATEMENT
    assert parse(Statement(**{**FACTS, "version": MAX_VERSION}).payload()).version == MAX_VERSION


def test_what_a_quantised_base_is_is_stated_and_left_out_elsewhere() -> None:
    """Devices of 0.2.0 read the statements of every base that they know."""
    assert b"logical" not in STATEMENT.payload()
    more: dict[str, Any] = {
        "logical": DIGEST,
        "beside": DIGEST,
        "quantisation": "e4m3 128x128, int4 1x32",
    }
    statement = Statement(**FACTS, **more)
    assert parse(statement.payload()) == statement


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": "0"}, "version"),
        ({"version": "07"}, "version"),
        ({"version": 7}, "version"),
        ({"version": str(1 << 53)}, "above"),
        ({"version": "9223372036854775807"}, "version"),
        ({"task": ""}, "task"),
        ({"task": "a\u001b[2J"}, "task"),
        ({"kinds": "orin"}, "kinds"),
        ({"kinds": ["x"] * 65}, "kinds"),
        ({"file": "sha256:AB"}, "file"),
        ({"not_after": "2027-02-30T00:00:00Z"}, "no day"),
        ({"not_after": 5}, "not_after"),
        ({"more": 1}, "unknown key"),
        ({"logical": ""}, "one spelling"),
        ({"logical": "root"}, "logical"),
        ({"beside": 7}, "beside"),
        ({"quantisation": "int4 1x0"}, "quantisation"),
        ({"quantisation": ["int4 1x32"]}, "quantisation"),
        ({"quantisation": ", ".join(["int4 1x32"] * 257)}, "quantisation"),
        ({"kind": "kilodelta-release-2"}, "kind"),
    ],
)
def test_odd_statements_are_named(change: dict[str, Any], words: str) -> None:
    facts = {**json.loads(STATEMENT.payload()), **change}
    data = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(FieldError, match=words):
        parse(data)


def test_another_spelling_of_a_statement_is_refused() -> None:
    with pytest.raises(FieldError, match="one spelling"):
        parse(json.dumps(json.loads(STATEMENT.payload())).encode())
    with pytest.raises(FieldError, match="not canonical JSON"):
        parse(b"\xff")


def test_what_a_user_types_is_checked() -> None:
    assert stated(FACTS) == STATEMENT
    assert time_of("2027-03-01") == "2027-03-01T00:00:00Z"
    for odd in ("soon", "2027-13-01", "2027-03-01T25:00:00Z"):
        with pytest.raises(InputError, match="no date"):
            time_of(odd)
    with pytest.raises(InputError, match="version"):
        stated({**FACTS, "version": 0})


def test_k_of_n_keys_must_have_signed(team: list[Any]) -> None:
    keys = publics(team)
    once = sign(STATEMENT, [team[0].private])
    assert verify(once, keys, 1) == (STATEMENT, [keys[0].keyid])
    with pytest.raises(SignatureError, match="signed by 1 of the 3 pinned keys; 2 must"):
        verify(once, keys, 2)
    twice = sign(STATEMENT, [team[1].private], before=once)
    assert len(verify(twice, keys, 2)[1]) == 2
    again = sign(STATEMENT, [team[0].private, team[0].private])
    with pytest.raises(SignatureError, match="signed by 1 of the 1"):
        verify(again, [keys[0], keys[0]], 2)
    with pytest.raises(InputError, match="another release"):
        sign(Statement(**{**FACTS, "version": 8}), [team[1].private], before=once)
    with pytest.raises(SignatureError, match="signed by 0"):
        verify(once, keys[1:], 1)
    with pytest.raises(InputError, match="no Ed25519 key"):
        sign(STATEMENT, [team[0].p256_private])


def test_a_bad_signature_of_one_hides_no_good_one(team: list[Any]) -> None:
    value = json.loads(sign(STATEMENT, [team[0].private, team[1].private]))
    value["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
    data = json.dumps(value).encode()
    assert len(verify(data, publics(team), 1)[1]) == 1
    with pytest.raises(SignatureError, match="signed by 1"):
        verify(data, publics(team), 2)


def test_every_flipped_bit_of_payload_or_signature_is_noticed(team: list[Any]) -> None:
    value = json.loads(sign(STATEMENT, [team[0].private]))
    keys = publics(team)[:1]
    payload = base64.b64decode(value["payload"])
    for at in range(0, len(payload), 7):
        changed = bytearray(payload)
        changed[at] ^= 1
        odd = {**value, "payload": base64.b64encode(changed).decode()}
        with pytest.raises(SignatureError):
            verify(json.dumps(odd).encode(), keys, 1)
    raw = base64.b64decode(value["signatures"][0]["sig"])
    for at in range(0, 64, 5):
        changed = bytearray(raw)
        changed[at] ^= 1
        one = {**value["signatures"][0], "sig": base64.b64encode(changed).decode()}
        with pytest.raises(SignatureError):
            verify(json.dumps({**value, "signatures": [one]}).encode(), keys, 1)


def test_a_signature_over_something_else_is_no_release(team: list[Any]) -> None:
    """The payload's type is signed too: an envelope of another tool cannot be passed off."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    private: Any = load_pem_private_key(team[0].private.read_bytes(), None)
    signer = CryptoSigner(private, publics(team)[0].securesystemslib())
    for kind, payload, words in (
        ("text/plain", STATEMENT.payload(), "text/plain"),
        (PAYLOAD_TYPE, b"{}", "no statement"),
    ):
        envelope = Envelope(payload, kind, {})
        envelope.sign(signer)
        with pytest.raises(SignatureError, match=words):
            verify(json.dumps(envelope.to_dict()).encode(), publics(team), 1)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff" * 20,
        b'{"payload": 3, "payloadType": "x", "signatures": []}',
        b'{"payload": "", "payloadType": [], "signatures": []}',
        b'{"payload": "!", "payloadType": "x", "signatures": [{"keyid": 1, "sig": ""}]}',
        b'{"payload": "", "payloadType": "x", "signatures": [{"keyid": "a", "sig": "!!"}]}',
        b'{"payload": "", "payloadType": "x", "signatures": 9}',
        b"[" * 5000,
        b" " * (MAX_ENVELOPE + 1),
    ],
)
def test_damaged_envelopes_are_one_sentence(data: bytes, team: list[Any]) -> None:
    with pytest.raises(SignatureError, match=r"damaged|signed by 0|over"):
        verify(data, publics(team), 1)


def allowed(pins: Pins, clock: Clock | None = None, **there: Any) -> None:
    held = {name: FACTS[name] for name in ("base", "file", "result", "version")}
    require_allowed(STATEMENT, pins, clock=clock or Clock(now=NOW), **{**held, **there})


def test_what_the_pins_cover_passes(team: list[Any]) -> None:
    keys = tuple(publics(team))
    allowed(Pins(keys=keys, task="intents", kind="orin"))
    allowed(Pins(keys=keys, kind="rtx"))


@pytest.mark.parametrize(
    ("pins", "more", "words"),
    [
        ({"task": "names"}, {}, "for task 'intents', this device is for 'names'"),
        ({"kind": "thor"}, {}, "for orin, rtx, this device is thor"),
        ({"kind": ""}, {}, "of no kind"),
        ({}, {"file": "sha256:" + "00" * 32}, "another file"),
        ({}, {"base": "sha256:" + "00" * 32}, "another base"),
        ({}, {"result": "sha256:" + "00" * 32}, "another result"),
        ({}, {"version": 8}, "another version"),
        ({}, {"clock": Clock(now=0)}, "valid from 2026-01-01"),
        ({}, {"clock": Clock(now=NOW * 2)}, "expired at 2027-03-01"),
    ],
)
def test_what_the_pins_do_not_cover_is_named(
    pins: dict[str, Any], more: dict[str, Any], words: str, team: list[Any]
) -> None:
    given = {"kind": "orin", **pins}
    with pytest.raises(SignatureError, match=words):
        allowed(Pins(keys=tuple(publics(team)), **given), **more)


def test_a_clock_never_runs_behind_what_was_seen() -> None:
    assert Clock.floored(100, system=200.5) == Clock(now=200)
    late = Clock.floored(NOW, system=0)
    assert late.now == NOW
    assert "2026-12-01T00:00:00Z" in late.note


def test_pins_come_back_from_json_and_odd_ones_are_named(team: list[Any]) -> None:
    pins = Pins(keys=tuple(publics(team)), threshold=2, task="intents", kind="orin")
    assert parse_pins(json.loads(json.dumps(pins.to_json()))) == pins
    for change, words in (
        ({"threshold": 0}, "threshold"),
        ({"threshold": 4}, "threshold"),
        ({"keys": []}, "keys"),
        ({"keys": [pins.keys[0].hex] * 2}, "different"),
        ({"keys": ["zz" * 32]}, "hexadecimal"),
        ({"version": True}, "version"),
        ({"extra": 1}, "unknown"),
    ):
        with pytest.raises(FieldError, match=words):
            parse_pins({**pins.to_json(), **change})


def test_a_signature_lies_beside_its_file(tmp_path: Path, team: list[Any]) -> None:
    file = tmp_path / "task-7.kd"
    assert read_signature(file) is None
    data = sign(STATEMENT, [team[0].private])
    assert write_signature(file, data) == tmp_path / "task-7.kd.sig"
    assert read_signature(file) == data
    signature_path(file).unlink()
    signature_path(file).symlink_to(team[0].private)
    with pytest.raises(SignatureError, match="cannot be read"):
        read_signature(file)
    with pytest.raises(OutputError, match="is a link"):
        write_signature(file, data)
    signature_path(file).unlink()
    signature_path(file).mkdir()
    with pytest.raises(SignatureError, match="no regular file"):
        read_signature(file)


WITHOUT_CRYPTOGRAPHY = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'cryptography':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Refuse())
from pathlib import Path
from kilodelta.trust import read_public, verify
keys = [read_public(sys.argv[1])]
print(verify(Path(sys.argv[2]).read_bytes(), keys, 1)[0].version)
"""


def test_a_device_checks_without_cryptography(tmp_path: Path, team: list[Any]) -> None:
    place = write_signature(tmp_path / "task.kd", sign(STATEMENT, [team[0].private]))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CRYPTOGRAPHY, str(team[0].public), str(place)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "7", done.stderr


def test_model_signing_verifies_the_bundle_as_its_own(tmp_path: Path, team: list[Any]) -> None:
    """The real model_signing, as a process: right, then a changed byte, then another key."""
    pytest.importorskip("model_signing")
    pytest.importorskip("OpenSSL")
    file = tmp_path / "task-7.kd"
    file.write_bytes(b"kilobytes of coefficients")
    digest = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    made = dataclasses.replace(STATEMENT, file=digest)
    bundle = tmp_path / "task-7.kd.sigstore.json"
    bundle.write_bytes(model_bundle(made, file.name, team[0].p256_private))
    code = (
        "import sys\nfrom model_signing import verifying\n"
        "verifying.Config().use_elliptic_key_verifier(public_key=sys.argv[1])"
        ".verify(sys.argv[2], sys.argv[3])\nprint('verified')\n"
    )

    def run(public: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(public), str(file), str(bundle)],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    assert "verified" in run(team[0].p256_public)
    assert "verified" not in run(team[1].p256_public)
    file.write_bytes(b"kilobytes of Coefficients")
    assert "verified" not in run(team[0].p256_public)
    with pytest.raises(InputError, match="no P-256 key"):
        model_bundle(made, file.name, team[0].private)
