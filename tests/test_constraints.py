"""What a device installs resolves by constraints.txt on each Python and processor that is named."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("packaging")
pytest.importorskip("tomllib")
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.support.device_install import (
    EXTRAS,
    LOCK,
    LOCK_CPU,
    PROCESSORS,
    PYTHONS,
    SBOM,
    device_wants,
    holds,
    pins,
    resolve,
)
from tests.support.processes import ROOT


@pytest.mark.parametrize("python", PYTHONS)
def test_a_package_is_pinned_once(python: str) -> None:
    names = [canonicalize_name(pin.name) for pin in pins() if holds(pin, python)]
    assert len(names) == len(set(names))
    assert {canonicalize_name(w.name) for w in device_wants() if holds(w, python)} - set(names) <= {
        "tomli"  # of 3.10 alone, and any version does
    }


@pytest.mark.parametrize("python", PYTHONS)
def test_no_pin_needs_another_python(python: str) -> None:
    """By the metadata of the packages that are installed here in the pinned version."""
    wrong, seen = [], 0
    for pin in pins():
        try:
            installed = importlib.metadata.distribution(pin.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not holds(pin, python) or not pin.specifier.contains(installed.version):
            continue
        seen += 1
        needs = installed.metadata.json.get("requires_python", "")
        if not SpecifierSet(str(needs)).contains(f"{python}.12"):
            wrong.append(f"{pin} needs {needs}")
    assert wrong == []
    assert seen


def test_the_pins_are_what_a_device_asks_for() -> None:
    by_name = {}
    for python in PYTHONS:
        by_name.update({(canonicalize_name(p.name), python): p for p in pins() if holds(p, python)})
        for wanted in device_wants():
            pin = by_name.get((canonicalize_name(wanted.name), python))
            if pin is not None and holds(wanted, python):
                version = re.sub(r"^==", "", str(pin.specifier))
                assert wanted.specifier.contains(version), f"{wanted} and {pin} on {python}"


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("python", PYTHONS)
def test_a_devices_install_resolves(python: str, processor: str, tmp_path: Path) -> None:
    """By pip itself, from wheels alone; skipped where no index is in reach."""
    done = resolve(python, processor, tmp_path, list(device_wants()))
    if done.returncode and "connection broken" in done.stderr:
        pytest.skip("no package index is in reach")
    assert done.returncode == 0, done.stderr
    names = {
        item["metadata"]["name"].lower()
        for item in json.loads((tmp_path / "report.json").read_text())["install"]
    }
    assert {"numpy", "numba", "click", "rich", "onnxruntime", "filelock", "tuf"} <= names


def locked() -> dict[str, tuple[Requirement, list[str]]]:
    """The requirements of both locks with their hashes, by the whole line."""
    found: dict[str, tuple[Requirement, list[str]]] = {}
    for name in (LOCK, LOCK_CPU):
        text = (ROOT / name).read_text().replace("\\\n", " ")
        for line in text.splitlines():
            if line.startswith("#"):
                continue
            words, *hashes = line.split("--hash=sha256:")
            found[words] = (Requirement(words.strip()), [h.strip() for h in hashes])
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_what_the_pins_say(python: str) -> None:
    """One version of each package, that of constraints.txt, and everything a device asks for."""
    by_name: dict[str, str] = {}
    for wanted, hashes in locked().values():
        assert hashes
        assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes), wanted
        if holds(wanted, python):
            name = str(canonicalize_name(wanted.name))
            assert name not in by_name, f"{name} twice on {python}"
            by_name[name] = str(wanted.specifier)
    pinned = {str(canonicalize_name(p.name)): str(p.specifier) for p in pins() if holds(p, python)}
    assert {n: v for n, v in by_name.items() if pinned.get(n, v) != v} == {}
    extras = tuple(name for name in EXTRAS if name != "fleet")
    asked = {canonicalize_name(w.name) for w in device_wants(extras) if holds(w, python)}
    assert asked <= by_name.keys()


def test_the_bill_of_materials_is_of_the_lock() -> None:
    """Every version that is locked, each with its licence, in the form that others read."""
    bill = json.loads((ROOT / SBOM).read_text())
    components = {(c["name"], f"=={c['version']}") for c in bill["components"]}
    wanted = {(canonicalize_name(w.name), str(w.specifier)) for w, _ in locked().values()}
    assert components == wanted
    refs = {c["bom-ref"] for c in bill["components"]}
    for entry in bill["dependencies"]:
        assert set(entry["dependsOn"]) <= refs
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    assert validator.validate_str((ROOT / SBOM).read_text()) is None


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_is_what_the_index_serves(python: str, processor: str, tmp_path: Path) -> None:
    """By pip with hashes required; skipped where no index is in reach."""
    import subprocess
    import sys

    lines = [
        f"{w.name}{w.specifier} " + " ".join(f"--hash=sha256:{h}" for h in hashes)
        for w, hashes in locked().values()
        if holds(w, python, processor)
    ]
    (tmp_path / "lock.txt").write_text("\n".join(lines))
    platforms = [f"manylinux_{version}_{processor}" for version in ("2_28", "2_27", "2_17")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"),
            *("--only-binary=:all:", "--implementation", "cp", "--python-version", python),
            *(word for name in platforms for word in ("--platform", name)),
            *("--platform", f"manylinux2014_{processor}"),
            *("-d", str(tmp_path / "wheels"), "-r", str(tmp_path / "lock.txt")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "connection broken" in done.stderr:
        pytest.skip("no package index is in reach")
    assert done.returncode == 0, done.stderr
