"""Every example in a docstring runs, and prints what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

from tests.support import shape
from tests.support.processes import ROOT

pytest.importorskip("torch")


def runs(path: Path) -> bool:
    """Whether a file has an example that is not skipped."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    return any(line.startswith(">>> ") and "+SKIP" not in line for line in lines)


MODULES = [path for path in shape.product_files() if runs(path)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_of_a_module(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # examples name the golden files from here
    try:
        module = importlib.import_module(shape.module_name(path))
    except ImportError as missing:
        pytest.skip(f"an optional package is missing: {missing}")
    done = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert done.attempted
    assert not done.failed


def test_a_wrong_example_fails() -> None:
    """The test above can fail."""
    parsed = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(parsed, out=lambda text: None).failed == 1
