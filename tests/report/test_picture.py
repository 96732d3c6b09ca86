"""README's picture is what its script draws from the committed result."""

from __future__ import annotations

import importlib.util
import json
from types import ModuleType
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from tests.support.processes import ROOT

RESULT = ROOT / "benchmarks" / "results" / "fidelity-2026-11-26-xeon-1-thread.json"
PICTURE = ROOT / "docs" / "fidelity.svg"


def script() -> ModuleType:
    place = ROOT / "benchmarks" / "fidelity_picture.py"
    spec = importlib.util.spec_from_file_location("fidelity_picture", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_drawn_from_the_committed_result() -> None:
    """By its words and numbers: another matplotlib may place a point elsewhere."""
    drawn = script().picture(json.loads(RESULT.read_text()))
    old, new = (ElementTree.fromstring(text) for text in (PICTURE.read_text(), drawn))
    assert old.attrib["aria-label"] == new.attrib["aria-label"]
    texts = [[e.text for e in tree.iter("{http://www.w3.org/2000/svg}text")] for tree in (old, new)]
    assert texts[0] == texts[1]
    assert "12 KB" in texts[0]


def test_the_alt_texts_on_the_pages_say_its_numbers() -> None:
    label = ElementTree.fromstring(PICTURE.read_text()).attrib["aria-label"]
    for number in ("87.6 %", "91.3 %", "92.0 %"):
        assert number in label
        for page in (ROOT / "README.md", ROOT / "docs" / "index.md"):
            assert number in page.read_text()


def test_the_picture_has_its_colours_for_light_and_dark_and_fetches_nothing() -> None:
    text = PICTURE.read_text()
    assert "prefers-color-scheme:dark" in text
    for name in ("--ink", "--c1", "--paper"):
        assert text.count(f"{name}:") == 2
    assert 'href="http' not in text
    assert "url(http" not in text
