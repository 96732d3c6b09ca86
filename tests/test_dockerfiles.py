"""The Dockerfiles name extras, files and commands that exist. They are not built here."""

from __future__ import annotations

import re

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


def test_there_is_one_for_each_kind_of_machine() -> None:
    assert [path.name for path in FILES] == ["build.Dockerfile", "device.Dockerfile"]
