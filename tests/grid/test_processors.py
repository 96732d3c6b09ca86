"""Merges in the grid have the digests that another processor computed (tests/golden/grids.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "grids.py"


@pytest.fixture(scope="module")
def grids() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_grids", GOLDEN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def require_digests(grids: ModuleType, work: Path, cases: tuple[str, ...]) -> None:
    expected = json.loads(GOLDEN.with_suffix(".json").read_text())
    found = grids.digests(work, cases)
    assert len(found) == len(cases) * len(grids.METHODS)
    assert found == {case: expected[case] for case in found}


@pytest.mark.parametrize("case", ["int4 groups of 96", "NVFP4"])
def test_a_merge_has_the_digests_of_every_machine(
    grids: ModuleType, tmp_path: Path, case: str
) -> None:
    require_digests(grids, tmp_path, (case,))


@pytest.mark.slow
def test_all_layouts_have_the_digests_of_every_machine(grids: ModuleType, tmp_path: Path) -> None:
    require_digests(grids, tmp_path, tuple(grids.CASES))
