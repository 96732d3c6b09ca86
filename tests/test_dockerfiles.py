"""The Dockerfiles name extras, files and commands that exist. They are not built here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("tomllib")
import tomllib

from kilodelta.cli import main
from tests.support.processes import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("name", ["build", "device"])
def test_a_dockerfile_installs_extras_that_exist_from_the_clone(name: str) -> None:
    text = (ROOT / "docker" / f"{name}.Dockerfile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (named,) = re.findall(r"'(?:\.|/src)\[([\w,]+)\]'", text)
    assert set(named.split(",")) <= set(extras["optional-dependencies"])
    assert "constraints.txt" in text
    assert "torch" not in named.split(",")
    for command in re.findall(r"kilodelta (\w+)", text):
        assert command in main.commands


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.name))
def test_a_dockerfile_keeps_to_what_linters_ask(path: Path) -> None:
    """Read as hadolint would: it is not installed here, and nothing is built."""
    lines = re.sub(r"\\\n\s*", "", path.read_text()).splitlines()
    steps = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "CMD"}
    assert {name for name, _ in steps} <= known
    said = {name: [text for other, text in steps if other == name] for name in known}
    for image in said["FROM"]:
        shown = image.replace("${BASE}", said["ARG"][0].partition("=")[2]) if said["ARG"] else image
        assert re.fullmatch(r"[\w./-]+:[\w.-]+", shown), shown  # a tag, and not the latest
        assert not shown.endswith(":latest")
    for place in said["WORKDIR"]:
        assert place.startswith("/")
    ignored = set((ROOT / ".dockerignore").read_text().split())
    for copied in said["COPY"]:
        source, _ = copied.split()
        assert (ROOT / source).exists()
    for needed in ("pyproject.toml", "README.md", "constraints.txt", "kilodelta", "compress"):
        assert (ROOT / needed).exists()
        assert needed not in ignored
    for command in said["RUN"]:
        if "apt-get install" in command:
            assert command.index("apt-get update") < command.index("apt-get install")
            assert "-y --no-install-recommends" in command
            assert "rm -rf /var/lib/apt/lists/*" in command
        if "pip install" in command:
            assert "--no-cache-dir" in command
    assert json.loads(said["CMD"][0])[0] == "kilodelta"  # the exec form: signals reach it


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert [path.name for path in FILES] == ["build.Dockerfile", "device.Dockerfile"]
