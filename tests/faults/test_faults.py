"""A few faults of each kind at each command; and that a careless command is found out.

The long form is `python -m tests.faults --kills 1000 --full 200 --pairs 100`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from kilodelta.device import modes
from kilodelta.errors import OutputError
from tests.faults import harness
from tests.faults.harness import KINDS, full_disks, kills, pairs, staged
from tests.faults.scenes import NEW, OLD, SCENES, Scene

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside a thread
CHEAP = [name for name, scene in SCENES.items() if not scene.costly]
COUNTS = {"kills": 3, "full": 2, "pairs": 1}


@pytest.mark.parametrize("name", CHEAP)
def test_no_fault_leaves_a_mixture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in SCENES[name].needs:
        pytest.importorskip(package)
    monkeypatch.setattr(modes, "OPENERS", dict(modes.OPENERS))  # scenes put a double there
    with staged(SCENES[name]) as stage:
        for kind, run in KINDS.items():
            result = run(stage, COUNTS[kind], Random(3))
            assert result.is_clean, result.notes
            assert result.trials == COUNTS[kind]


def test_a_disk_is_full_without_a_mount_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_mount", lambda *_: False)
    with staged(SCENES["merge"]) as stage:
        result = full_disks(stage, 6, Random(3))
    assert result.is_clean, result.notes
    assert result.in_time > 0


def careless(act: Callable[[Path], object], left: list[str] | None = None) -> Scene:
    """A command that writes "new" over "old" in its own way."""

    def judge(work: Path) -> str:
        return {"old" * 1000: OLD, "new" * 1000: NEW}[(work / "a").read_text()]

    return Scene(
        name="careless",
        ready=lambda work: (work / "a").write_text("old" * 1000),
        act=act,
        judge=judge,
        left=lambda work: [p.name for p in work.iterdir() if p.name != "a"],
    )


def _in_place(work: Path) -> None:
    with (work / "a").open("w") as file:
        for _ in range(100):
            file.write("new" * 10)
            file.flush()
            time.sleep(0.002)


def _beside(work: Path) -> None:
    (work / f"a.{time.time_ns()}").write_text("new" * 1000)
    time.sleep(0.1)
    for path in work.glob("a.*"):
        path.replace(work / "a")
        break


def _once(work: Path) -> None:
    if (work / "lock").exists():
        raise OutputError("locked", fix="wait")
    (work / "lock").touch()
    time.sleep(0.1)
    (work / "a").write_text("new" * 1000)
    (work / "lock").unlink()


def test_a_file_written_in_place_is_a_mixture() -> None:
    with staged(careless(_in_place)) as stage:
        assert kills(stage, 3, Random(1)).mixtures > 0


def test_a_stage_that_nobody_removes_is_a_leftover() -> None:
    with staged(careless(_beside)) as stage:
        assert kills(stage, 5, Random(1)).leftovers > 0


def test_a_lock_that_outlives_its_process_is_a_lost_state() -> None:
    with staged(careless(_once)) as stage:
        assert kills(stage, 5, Random(1)).lost > 0


def test_a_full_disk_that_gives_a_traceback_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_mount", lambda *_: False)
    with staged(careless(_in_place)) as stage:
        assert full_disks(stage, 4, Random(1)).tracebacks > 0


def test_writers_that_meet_have_one_process_id() -> None:
    import os

    def act(work: Path) -> None:
        (work / f"pid-{time.time_ns()}").write_text(str(os.getpid()))
        (work / "a").write_text("new" * 1000)

    seen: list[str] = []
    scene = careless(act)

    def left(work: Path) -> list[str]:
        found = sorted(work.glob("pid-*"))
        seen.extend(path.read_text() for path in found[:2])
        return []

    with staged(Scene(**{**vars(scene), "left": left})) as stage:
        seen.clear()
        pairs(stage, 1, Random(1))
    assert len(seen) == 2
    assert len(set(seen)) == 1
