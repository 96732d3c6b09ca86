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


MOST_USED = (
    "kilodelta.format.file:load",
    "kilodelta.format.inspect:inspect",
    "kilodelta.format.delta:Delta.expand",
    "kilodelta.files.model_digest:digest",
    "kilodelta.files.checkpoint:Checkpoint",
    "kilodelta.export.merge.checkpoint:merge",
    "kilodelta.export.peft.adapter:export_peft",
    "kilodelta.compress.distill.compress:compress",
    "kilodelta.compress.adapters.importing:import_adapter",
    "kilodelta.compress.training.train:attach",
    "kilodelta.compress.training.train:quantise",
    "kilodelta.compress.training.train:save",
    "kilodelta.merging.build:build",
    "kilodelta.merging.diff:diff",
    "kilodelta.report.card:card",
    "kilodelta.verify.verification:verify",
    "kilodelta.verify.environment.doctor:doctor",
    "kilodelta.trust.keys:keygen",
    "kilodelta.trust.envelope:sign",
    "kilodelta.trust.envelope:verify",
)
"""Functions that users call first, and that need neither a GPU nor a model of megabytes."""


@pytest.mark.parametrize("place", MOST_USED)
def test_the_most_used_functions_have_an_example_that_runs(place: str) -> None:
    module, _, name = place.partition(":")
    if module.startswith("kilodelta.trust"):
        pytest.importorskip("cryptography")
    function: object = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    [test] = doctest.DocTestFinder(recurse=False).find(function, name)
    calls = [e for e in test.examples if doctest.OPTIONFLAGS_BY_NAME["SKIP"] not in e.options]
    assert any(name.rpartition(".")[2] + "(" in e.source or ".open(" in e.source for e in calls)
    assert module in {shape.module_name(path) for path in MODULES}


def test_a_wrong_example_fails() -> None:
    """The test above can fail."""
    parsed = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(parsed, out=lambda text: None).failed == 1
