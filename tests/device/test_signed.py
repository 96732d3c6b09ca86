"""Devices that take signed releases only: what they take, what they refuse, how keys change."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("cryptography")
pytest.importorskip("securesystemslib")
from kilodelta.cli import main
from kilodelta.device import apply, pull, release, status, trust
from kilodelta.device.make.signing import Signing, sign_release
from kilodelta.device.update.trust import pins_from, write_pins
from kilodelta.errors import DeviceError, DowngradeError, FileError, InputError, SignatureError
from kilodelta.format.file import load
from kilodelta.format.manifest import Grid
from kilodelta.trust import keygen, publish, read_public, verify
from kilodelta.trust.envelope import read_signature
from kilodelta.trust.tuf_repository import first_root
from tests.doubles import numpy_device
from tests.support.mirrors import mirror_of


class Team:
    """A device of the linear model that pins keys, and releases for it."""

    def __init__(self, place: Path, **pins: Any) -> None:
        self.place = place
        self.base = numpy_device.base(place / "base.safetensors")
        self.keys = [keygen(place / name) for name in ("one", "two", "stranger")]
        self.device = numpy_device.folder(place / "device", self.base)
        self.pin(**pins)

    def pin(self, count: int = 1, threshold: int = 1, task: str = "", kind: str = "") -> None:
        publics = [one.public for one in self.keys[:count]]
        pins = pins_from(publics, threshold=threshold, task=task, kind=kind)
        assert pins is not None
        write_pins(self.device / "trust.json", pins)

    def release(self, version: int, *signers: int, **given: Any) -> Path:
        raw = self.place / "raw.kd"
        numpy_device.delta(self.base, version).save(raw)
        out = self.place / f"task-{version}.kd"
        signing = {"sign": [self.keys[i].private for i in signers], "task": "intents", **given}
        release(self.base, raw, out, version=version, **(signing if signers else {}))
        return out


@pytest.fixture
def team(standin: None, tmp_path: Path) -> Team:
    return Team(tmp_path, task="intents", kind="orin")


def test_what_a_pinned_key_signed_is_served(team: Team) -> None:
    done = apply(team.device, team.release(7, 0))
    assert done.state.serving.version == 7
    assert len(done.signed_by) == 1
    assert done.to_json()["signed_by"] == list(done.signed_by)
    assert done.state.seen > 1_700_000_000
    seen = status(team.device)
    assert seen.pins is not None
    assert seen.to_json()["trust"]["task"] == "intents"
    proved = [e for e in seen.history if e["event"] == "proved"]
    assert proved[-1]["signed_by"] == list(done.signed_by)


def test_a_device_without_keys_says_that_it_takes_unsigned_files(team: Team) -> None:
    (team.device / "trust.json").unlink()
    file = team.release(7)
    told = [
        CliRunner().invoke(main, [*command, str(team.device), *more])
        for command, more in ((["apply"], [str(file)]), (["status"], []))
    ]
    assert [one.exit_code for one in told] == [0, 0]
    assert "unsigned" in told[0].stdout
    assert "unsigned" in told[1].stdout
    proved = [e for e in status(team.device).history if e["event"] == "proved"]
    assert proved[-1]["signed_by"] == []


@pytest.mark.parametrize(
    ("signers", "given", "words"),
    [
        ((), {}, "is not signed: task-7.kd.sig is not beside it"),
        ((2,), {}, "signed by 0 of the 1 pinned keys"),
        ((0,), {"task": "names"}, "for task 'names', this device is for 'intents'"),
        ((0,), {"kinds": ["rtx"]}, "for rtx, this device is orin"),
        ((0,), {"not_before": "2020-01-01", "not_after": "2021-01-01"}, "expired at 2021-01-01"),
        ((0,), {"not_before": "2999-01-01"}, "valid from 2999-01-01"),
    ],
)
def test_anything_else_is_refused_and_nothing_changes(
    team: Team, signers: tuple[int, ...], given: dict[str, Any], words: str
) -> None:
    file = team.release(7, *signers, **given)
    before = (team.device / "current").read_bytes()
    with pytest.raises(SignatureError, match=words):
        apply(team.device, file)
    assert (team.device / "current").read_bytes() == before
    assert list((team.device / "deltas").iterdir()) == []


def test_what_is_not_there_or_no_change_is_called_that(team: Team) -> None:
    with pytest.raises(FileError, match=r"nothing\.kd cannot be opened: No such file"):
        apply(team.device, team.device.parent / "nothing.kd")
    texts = team.device.parent / "texts.txt"
    with pytest.raises(InputError, match=r"texts\.txt cannot be read: No such file"):
        trust(team.device, signed=texts)
    texts.write_text("a text\n")
    with pytest.raises(SignatureError, match=r"texts\.txt is no signed change of pins"):
        trust(team.device, signed=texts)


def test_nothing_of_an_unsigned_file_is_parsed(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    file = team.release(7)

    def parsed(*_: Any) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr("kilodelta.device.update.apply.load", parsed)
    with pytest.raises(SignatureError):
        apply(team.device, file)


def test_a_signature_is_of_one_file(team: Team) -> None:
    seven, eight = team.release(7, 0), team.release(8, 0)
    shutil.copy(f"{eight}.sig", f"{seven}.sig")
    with pytest.raises(SignatureError, match="another file"):
        apply(team.device, seven)


def test_a_signature_does_not_lift_the_order_of_versions(team: Team) -> None:
    apply(team.device, team.release(7, 0))
    with pytest.raises(DowngradeError):
        apply(team.device, team.release(6, 0))
    with pytest.raises(DowngradeError, match="takes none above"):
        apply(team.device, team.release(5_000_000, 0))


def test_expiry_is_judged_by_the_latest_time_that_is_certain(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands at 1970; a release that began in 2030 has been served."""
    first = team.release(7, 0, not_before="2030-01-01")
    short = team.release(8, 0, not_before="2026-01-01", not_after="2029-01-01")
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.0)
    apply(team.device, first)
    monkeypatch.setattr("time.time", lambda: 0.0)
    with pytest.raises(SignatureError, match=r"(?s)expired at 2029.*clock lies before 2030"):
        apply(team.device, short)
    done = apply(team.device, team.release(9, 0, not_before="2026-01-01"))
    assert "clock lies before 2030" in done.warnings[0]


def test_two_of_two_must_sign(standin: None, tmp_path: Path) -> None:
    team = Team(tmp_path, count=2, threshold=2)
    with pytest.raises(SignatureError, match="signed by 1 of the 2"):
        apply(team.device, team.release(7, 0))
    assert len(apply(team.device, team.release(8, 0, 1)).signed_by) == 2


def test_a_damaged_trust_file_lets_nothing_pass(team: Team) -> None:
    file = team.release(7, 0)
    (team.device / "trust.json").write_text("{}")
    with pytest.raises(DeviceError, match=r"trust\.json is wrong"):
        apply(team.device, file)
    (team.device / "trust.json").unlink()
    (team.device / "trust.json").symlink_to(team.keys[0].public)
    with pytest.raises(DeviceError, match=r"trust\.json is a link"):
        apply(team.device, file)


def test_a_release_is_signed_whole_or_not_written(team: Team) -> None:
    with pytest.raises(InputError, match="no Ed25519 key"):
        team.release(7, 0, sign=[team.keys[0].p256_private])
    assert not (team.place / "task-7.kd").exists()
    for given, words in (
        ({"task": ""}, "for a task"),
        ({"not_after": "2001-01-01"}, "before it begins"),
        ({"not_after": "soon"}, "no date"),
        ({"kinds": ["a b"]}, "cannot be stated"),
    ):
        with pytest.raises(InputError, match=words):
            team.release(7, 0, **given)
        assert not (team.place / "task-7.kd").exists()
    with pytest.raises(InputError, match="there is no key"):
        release(team.base, team.release(3), team.place / "x.kd", version=3, task="intents")


def test_both_signatures_are_written(team: Team) -> None:
    file = team.release(7, 0, model_signing=team.keys[0].p256_private)
    names = sorted(path.name for path in team.place.glob("task-7.kd*"))
    assert names == ["task-7.kd", "task-7.kd.sig", "task-7.kd.sigstore.json"]
    verifying = pytest.importorskip("model_signing.verifying")
    config = verifying.Config()
    config.use_elliptic_key_verifier(public_key=team.keys[0].p256_public)
    config.verify(file, Path(f"{file}.sigstore.json"))


def test_a_quantised_base_is_stated_by_its_logical_root(team: Team) -> None:
    root = "sha256:" + "ab" * 32
    grid = Grid(logical=root, grids=root, plain=root, config=root, weights=3, kinds=("int4 1x32",))
    file = team.release(7)
    delta = load(file)
    delta = replace(delta, manifest=replace(delta.manifest, grid=grid, beside=root))
    signing = Signing(keys=[team.keys[0].private], task="intents")
    sign_release(file, delta, 7, team.base, signing)
    data = read_signature(file)
    assert data is not None
    statement, _ = verify(data, [read_public(team.keys[0].public)], 1)
    assert (statement.logical, statement.quantisation) == (root, "int4 1x32")
    assert statement.beside == root


def test_a_pedigree_names_the_base_as_the_ancestor(team: Team) -> None:
    file = team.release(7, 0, pedigree=True)
    text = Path(f"{file}.cdx.json").read_text()
    bill = json.loads(text)
    made, root = bill["metadata"]["component"], load(file).manifest.base.root
    assert made["hashes"] == [{"alg": "SHA-256", "content": sha256(file.read_bytes()).hexdigest()}]
    (base,) = made["pedigree"]["ancestors"]
    assert {"name": "kilodelta:root", "value": root} in base["properties"]
    assert {"name": "kilodelta:task", "value": "intents"} in made["properties"]
    file.unlink()
    assert Path(f"{team.release(7, 0, pedigree=True)}.cdx.json").read_text() == text
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"SHA-256"', '"SHA"')) is not None


def test_keys_change_by_a_pinned_key_alone(team: Team) -> None:
    one, two, stranger = team.keys
    with pytest.raises(SignatureError, match="signed by 0"):
        trust(team.device, add=[two.public], by=[stranger.private])
    done = trust(team.device, add=[two.public], by=[one.private])
    assert len(done.pins.keys) == 2
    apply(team.device, team.release(7, 1))
    trust(team.device, remove=[one.public], by=[two.private])
    with pytest.raises(SignatureError, match="signed by 0"):
        apply(team.device, team.release(8, 0))
    with pytest.raises(InputError, match="is not pinned"):
        trust(team.device, remove=[one.public], by=[two.private])
    with pytest.raises(InputError, match="could not be met"):
        trust(team.device, remove=[two.public], by=[two.private])


def test_a_change_travels_as_a_file_and_is_good_once(team: Team) -> None:
    one, two, _ = team.keys
    other = team.place / "other"
    shutil.copytree(team.device, other)
    file = team.place / "change.json"
    trust(team.device, add=[two.public], threshold=2, by=[one.private], out=file)
    assert len(trust(team.device, signed=file).pins.keys) == 2
    assert trust(other, signed=file).pins.threshold == 2
    with pytest.raises(SignatureError):
        trust(other, signed=file)
    third, again = team.place / "third", team.place / "again.json"
    Team.pin(team)
    shutil.copytree(team.device, third)
    trust(third, add=[two.public], by=[one.private], out=again)
    trust(third, signed=again)
    with pytest.raises(SignatureError, match="made for other pins"):  # its signature still counts
        trust(third, signed=again)
    damaged = json.loads(file.read_text())
    damaged["payload"] = "e30="
    file.write_text(json.dumps(damaged))
    with pytest.raises(SignatureError):
        trust(other, signed=file)


def test_a_version_far_too_high_is_taken_back_by_a_signature(team: Team) -> None:
    apply(team.device, team.release(900_000, 0))
    with pytest.raises(DowngradeError):
        apply(team.device, team.release(8, 0))
    done = trust(team.device, reset_version=7, by=[team.keys[0].private])
    assert done.highest == 7
    assert apply(team.device, team.release(9, 0)).state.serving.version == 9


def test_odd_changes_are_sentences(team: Team, standin: None, tmp_path: Path) -> None:
    for given, words in (
        ({}, "nothing is to be changed"),
        ({"add": [team.keys[1].public]}, "must sign the change"),
        ({"signed": team.place / "none"}, "none"),
        ({"signed": team.place / "x", "threshold": 2}, "by itself"),
        ({"add": [team.keys[1].private], "by": [team.keys[0].private]}, "private key"),
    ):
        with pytest.raises(InputError, match=words):
            trust(team.device, **given)
    (team.device / "trust.json").unlink()
    with pytest.raises(DeviceError, match="pins no keys"):
        trust(team.device, threshold=1, by=[team.keys[0].private])
    with pytest.raises(InputError, match="pinned with keys"):
        pins_from([], threshold=1, task="x", kind="")


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    with mirror_of(tmp_path / "repo") as url:
        yield tmp_path / "repo", url


def test_a_release_reaches_a_device_by_the_mirror(team: Team, mirror: tuple[Path, str]) -> None:
    pytest.importorskip("tuf")
    repo, url = mirror
    releases = [team.release(7, 0), team.release(8, 0, kinds=["rtx"])]
    publish(releases, repo, key=team.keys[0].private)
    with pytest.raises(InputError, match="pins no mirror"):
        pull(team.device, url)
    (team.device / "root.json").write_bytes(first_root(repo / "metadata" / "1.root.json"))
    got = pull(team.device, url)
    assert got is not None
    assert got.version == 7
    assert apply(team.device, got.path).state.serving.version == 7
    with pytest.raises(InputError, match="pinned already"):
        pull(team.device, url, root=repo / "metadata" / "1.root.json")
    shutil.rmtree(team.device / "mirror")
    (team.device / "mirror").symlink_to(team.place)
    with pytest.raises(DeviceError, match="is a link"):
        pull(team.device, url)


def test_a_release_never_stands_unsigned(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens between the file and its signature, neither is seen without the other."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kilodelta.device.make.signing.write_signature", killed)
        with pytest.raises(KeyboardInterrupt):
            team.release(7, 0)
    assert not [path.name for path in team.place.iterdir() if path.name.startswith("task-7")]
    real, seen = os.replace, []

    def replace(source: Any, target: Any, **given: Any) -> None:
        if str(target).endswith((".kd", ".sig")) and ".tmp" not in str(target):
            seen.append(Path(target).name)
        real(source, target, **given)

    monkeypatch.setattr(os, "replace", replace)
    team.release(7, 0)
    assert seen[-2:] == ["task-7.kd.sig", "task-7.kd"]


UNITS = Path(__file__).parents[2] / "examples" / "systemd"


def run_unit(name: str, place: dict[str, str]) -> list[Any]:
    """Run the commands of a systemd unit, with the paths of its EnvironmentFile replaced."""
    from click.testing import CliRunner

    from kilodelta.cli import main

    stated = {line.partition("=")[0] for line in (UNITS / "kilodelta.env").read_text().split("\n")}
    assert place.keys() <= stated
    results = []
    for line in (UNITS / name).read_text().splitlines():
        key, _, command = line.partition("=")
        if key in ("ExecStart", "ExecStopPost"):
            program, *arguments = command.split()
            assert program == "/opt/kilodelta/bin/kilodelta"
            given = [place.get(a[2:-1], a) if a.startswith("${") else a for a in arguments]
            results.append(CliRunner().invoke(main, given))
    return results


def test_the_units_of_systemd_pull_apply_and_tell(team: Team, mirror: tuple[Path, str]) -> None:
    pytest.importorskip("tuf")
    repo, url = mirror
    publish([team.release(7, 0)], repo, key=team.keys[0].private)
    (team.device / "root.json").write_bytes(first_root(repo / "metadata" / "1.root.json"))
    metrics = team.place / "kilodelta.prom"
    place = {"DEVICE": str(team.device), "MIRROR": url, "METRICS": str(metrics)}
    pulled, told = run_unit("kilodelta-update.service", place)
    assert (pulled.exit_code, told.exit_code) == (0, 0), pulled.output + told.output
    assert "kilodelta_serving_version 7\n" in metrics.read_text()
    assert 'kilodelta_last_event_timestamp_seconds{event="committed"} ' in metrics.read_text()
    late = team.release(9, 0, not_before="2020-01-01", not_after="2021-01-01")
    publish([late], repo, key=team.keys[0].private)
    refused, told = run_unit("kilodelta-update.service", place)
    assert refused.exit_code != 0
    assert told.exit_code == 0
    assert "kilodelta_serving_version 7\n" in metrics.read_text()
    assert 'kilodelta_journal_entries{event="failed"} 1\n' in metrics.read_text()
    [checked] = run_unit("kilodelta-health.service", place)
    assert checked.exit_code == 0, checked.output
    assert "kilodelta_checked 1\n" in metrics.read_text()
    before = metrics.read_text()
    served = next((team.device / "deltas").iterdir())
    (served / "facts.json").write_text("[]")
    (served / "delta.kd").write_bytes(b"damaged")
    (served / "facts.json").unlink()
    [damaged] = run_unit("kilodelta-health.service", place)
    assert damaged.exit_code == 13, damaged.output
    assert metrics.read_text() == before  # an alert on the file's age tells


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_reads_the_units(tmp_path: Path) -> None:
    """A misspelt key is a warning that nobody sees, and the unit runs without it."""
    units = sorted(path for path in UNITS.iterdir() if path.suffix in (".service", ".timer"))
    for path in units:
        text = path.read_text().replace("/opt/kilodelta/bin/kilodelta", "/bin/true")
        (tmp_path / path.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / p.name) for p in units)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    told = [
        line for line in done.stderr.splitlines() if str(tmp_path) in line or "kilodelta" in line
    ]
    assert (done.returncode, told) == (0, [])


def test_metrics_are_printed_and_escaped(team: Team) -> None:
    from click.testing import CliRunner

    from kilodelta.cli import main
    from kilodelta.device.folder import metrics

    both = CliRunner().invoke(main, ["status", str(team.device), "--prometheus", "--json"])
    assert both.exit_code == 2
    assert "name a file for the metrics" in json.loads(both.stdout)["error"]
    done = CliRunner().invoke(main, ["status", str(team.device), "--prometheus"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert "kilodelta_serving_version 0" in lines
    assert 'kilodelta_serving_info{delta=""} 1' in lines
    samples = [line.partition("{")[0].split()[0] for line in lines if not line.startswith("#")]
    typed = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert set(samples) == typed
    assert metrics._sample("x", {"a": 'q"\\\n'}, 1.5) == 'kilodelta_x{a="q\\"\\\\\\n"} 1.5'
