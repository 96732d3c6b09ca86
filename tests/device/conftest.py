"""Device folders of the linear model, for all tests that ask for `bench`."""

from __future__ import annotations

from pathlib import Path

import pytest

from kilodelta.device import modes
from tests.doubles import numpy_device
from tests.support.devices import Bench


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let patch mode be the linear model in numpy."""
    monkeypatch.setitem(modes.OPENERS, "patch", numpy_device.StandIn)


@pytest.fixture
def bench(standin: None, tmp_path: Path) -> Bench:
    return Bench(tmp_path)
