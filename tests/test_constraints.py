"""What a device installs resolves by constraints.txt on each Python and processor that is named."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("packaging")
pytest.importorskip("tomllib")
import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.support.processes import ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PROCESSORS = ("x86_64", "aarch64")
GLIBC = ("2_28", "2_27", "2_17")
"""JetPack 6 and 7 have newer ones; wheels are tagged by the oldest that they need."""
EXTRAS = ("cpu", "trust", "mirror", "fleet")
"""What a device may install besides the core."""


def environment(python: str, processor: str = "x86_64") -> dict[str, str]:
    """The markers' environment of a machine."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.12",
        "platform_machine": processor,
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_system": "Linux",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def holds(wanted: Requirement, python: str, processor: str = "x86_64") -> bool:
    return wanted.marker is None or wanted.marker.evaluate(environment(python, processor))


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def device_wants() -> Iterator[Requirement]:
    """The core's dependencies and those of a device's extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *(text for name in EXTRAS for text in extras[name])):
        if not text.startswith("kilodelta["):
            yield Requirement(text)


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
    """By pip itself, from wheels alone; skipped where no index is in reach.

    pip evaluates markers for the Python that it runs on, so they are evaluated here before.
    """
    chosen = tmp_path / "constraints.txt"
    lines = [f"{p.name}{p.specifier}" for p in pins() if holds(p, python, processor)]
    chosen.write_text("\n".join(lines))
    wanted = [f"{w.name}{w.specifier}" for w in device_wants() if holds(w, python, processor)]
    report = tmp_path / "report.json"
    platforms = [f"manylinux_{version}_{processor}" for version in GLIBC]
    platforms.append(f"manylinux2014_{processor}")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"),
            *("--quiet", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"),
            *("--implementation", "cp", "--python-version", python),
            *(word for name in platforms for word in ("--platform", name)),
            *("--target", str(tmp_path / "target"), "--report", str(report)),
            *("-c", str(chosen), *wanted),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and "No matching distribution found for numpy" in done.stderr:
        pytest.skip("no package index is in reach")
    assert done.returncode == 0, done.stderr
    names = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert {"numpy", "numba", "click", "rich", "onnxruntime", "filelock", "tuf"} <= names
