"""What a device installs, as pip resolves it for each Python and processor: pins, lock, SBOM.

``python -m tests.support.device_install`` writes the locks `requirements-device.txt` (the core with
signatures and mirror) and `requirements-device-cpu.txt` (ONNX Runtime), with all wheels' digests,
and `docs/device-sbom.cdx.json` over both. It asks pip for metadata only; no wheel is fetched.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.processes import ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
PROCESSORS = ("x86_64", "aarch64")
GLIBC = ("2_28", "2_27", "2_17")
"""JetPack 6 and 7 have newer ones; wheels are tagged by the oldest that they need."""
EXTRAS = ("cpu", "trust", "mirror", "fleet")
"""What a device may install besides the core."""
LOCK, LOCK_CPU = "requirements-device.txt", "requirements-device-cpu.txt"
SBOM = "docs/device-sbom.cdx.json"

Versions = Mapping[str, Mapping[str, tuple[frozenset[str], frozenset[str]]]]
"""By name, then by version: the Pythons that take it, and the SHA-256 of its wheels."""


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
    """Whether a requirement's marker is true on a machine."""
    return wanted.marker is None or wanted.marker.evaluate(environment(python, processor))


def pins() -> list[Requirement]:
    """The lines of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def device_wants(chosen: Sequence[str] = EXTRAS) -> Iterator[Requirement]:
    """The core's dependencies and those of a device's extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *(text for name in chosen for text in extras[name])):
        if not text.startswith("kilodelta["):
            yield Requirement(text)


def resolve(
    python: str, processor: str, folder: Path, wanted: Sequence[Requirement]
) -> subprocess.CompletedProcess[str]:
    """Let pip choose the wheels for a machine, and write `report.json` into a folder.

    pip evaluates markers for the Python that it runs on, so they are evaluated here before.
    """
    chosen = folder / "constraints.txt"
    lines = [f"{p.name}{p.specifier}" for p in pins() if holds(p, python, processor)]
    chosen.write_text("\n".join(lines))
    names = [f"{w.name}{w.specifier}" for w in wanted if holds(w, python, processor)]
    platforms = [f"manylinux_{version}_{processor}" for version in GLIBC]
    platforms.append(f"manylinux2014_{processor}")
    return subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"),
            *("--quiet", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"),
            *("--implementation", "cp", "--python-version", python),
            *(word for name in platforms for word in ("--platform", name)),
            *("--target", str(folder / "target"), "--report", str(folder / "report.json")),
            *("-c", str(chosen), *names),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def resolved(extras: Sequence[str]) -> Versions:
    """Ask pip for every Python and processor."""
    pythons: dict[tuple[str, str], set[str]] = defaultdict(set)
    digests: dict[tuple[str, str], set[str]] = defaultdict(set)
    for python in PYTHONS:
        for processor in PROCESSORS:
            with tempfile.TemporaryDirectory() as name:
                done = resolve(python, processor, Path(name), list(device_wants(extras)))
                if done.returncode:
                    raise SystemExit(done.stderr)
                report = json.loads((Path(name) / "report.json").read_text())
            for item in report["install"]:
                package = str(canonicalize_name(item["metadata"]["name"]))
                chosen = (package, str(item["metadata"]["version"]))
                pythons[chosen].add(python)
                digests[chosen].add(item["download_info"]["archive_info"]["hashes"]["sha256"])
    found: dict[str, dict[str, tuple[frozenset[str], frozenset[str]]]] = defaultdict(dict)
    for name, version in sorted(pythons):
        key = (name, version)
        found[name][version] = (frozenset(pythons[key]), frozenset(digests[key]))
    return found


def lock(versions: Versions, head: str) -> str:
    """Write a requirements file with hashes."""
    lines = [f"# {line}" for line in head.splitlines()]
    for name, by_version in versions.items():
        for version, (pythons, digests) in by_version.items():
            lines.append(f"{name}=={version}{_marker(pythons)} \\")
            lines += [f"    --hash=sha256:{digest} \\" for digest in sorted(digests)]
            lines[-1] = lines[-1].removesuffix(" \\")
    return "\n".join(lines) + "\n"


def _marker(pythons: frozenset[str]) -> str:
    if pythons == set(PYTHONS):
        return ""
    first = [p for p in PYTHONS if p in pythons]
    if pythons == set(PYTHONS[PYTHONS.index(first[0]) :]):
        return f' ; python_version >= "{first[0]}"'
    return " ; " + " or ".join(f'python_version == "{python}"' for python in first)


def sbom(core: Versions, cpu: Versions) -> dict[str, Any]:
    """Describe the install as a CycloneDX 1.6 bill of materials.

    Licences and dependencies come from the metadata of the packages that are installed here.
    """
    import kilodelta

    root = f"pkg:pypi/kilodelta@{kilodelta.__version__}"
    components, depends = [], [{"ref": root, "dependsOn": sorted(_refs(core, device_wants()))}]
    everything = {**core, **cpu}
    for name, by_version in everything.items():
        needs = sorted(_refs(everything, _requirements(name)))
        for version in by_version:
            ref = f"pkg:pypi/{name}@{version}"
            components.append(
                {
                    "type": "library",
                    "bom-ref": ref,
                    "name": name,
                    "version": version,
                    "purl": ref,
                    "scope": "required" if name in core else "optional",
                    **_licence(name),
                }
            )
            depends.append({"ref": ref, "dependsOn": needs})
    main = {"type": "application", "bom-ref": root, "name": "kilodelta", "purl": root}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**main, "version": kilodelta.__version__}},
        "components": components,
        "dependencies": depends,
    }


def _refs(versions: Versions, wanted: Iterator[Requirement]) -> set[str]:
    names = {canonicalize_name(w.name) for w in wanted}
    return {f"pkg:pypi/{n}@{v}" for n in names & versions.keys() for v in versions[n]}


def _requirements(name: str) -> Iterator[Requirement]:
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        wanted = Requirement(line)
        if any(holds(wanted, python) for python in PYTHONS):
            yield wanted


def _licence(name: str) -> dict[str, Any]:
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return {}
    if "License-Expression" in metadata:
        return {"licenses": [{"expression": metadata["License-Expression"]}]}
    named = [
        c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if "License" in c
    ]
    return {"licenses": [{"license": {"name": n}} for n in named]} if named else {}


HEAD = """What a device installs, each wheel by its digest: x86-64 and aarch64, Python 3.10 to 3.14.
pip install --require-hashes -r {files}, then pip install --no-deps .
Made by python -m tests.support.device_install from constraints.txt."""


def main() -> None:
    """Write the locks and the bill of materials."""
    core = resolved(("trust", "mirror"))
    whole = resolved(("trust", "mirror", "cpu"))
    cpu = {name: versions for name, versions in whole.items() if name not in core}
    (ROOT / LOCK).write_text(lock(core, HEAD.format(files=LOCK)))
    (ROOT / LOCK_CPU).write_text(lock(cpu, HEAD.format(files=f"{LOCK} -r {LOCK_CPU}")))
    (ROOT / SBOM).write_text(json.dumps(sbom(core, cpu), indent=1) + "\n")


if __name__ == "__main__":
    main()
