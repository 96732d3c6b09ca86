"""A full disk is said before the training, with what is needed and what is free."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from kilodelta.compress import Options, compress, plan
from kilodelta.compress.distill import compress as compressing
from kilodelta.compress.distill.learn import state as states
from kilodelta.compress.distill.learn import steps
from kilodelta.compress.distill.planning import disk
from kilodelta.compress.distill.planning import plan as planning
from kilodelta.errors import OutputError
from kilodelta.files.staging import Need
from kilodelta.format.methods import Lora, UniLora
from tests.support import pico
from tests.support.disks import with_free


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base, tuned model and texts; the working directory."""
    monkeypatch.chdir(tmp_path)
    pico.tuned(pico.bert_classifier(tmp_path / "base"), tmp_path / "tuned", size=0.2)
    words = pico.WORDS.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 4 + i % 5)) for i in range(64)]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "out").mkdir()
    return tmp_path


def squeeze(**fields: Any) -> None:
    options = Options(steps=4, batch=8, **fields)
    compress("base", "tuned", "out/task.kd", inputs="texts.txt", options=options)


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("the work began")


def test_a_budget_without_room_is_said_before_a_model_is_opened(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressing, "prepare", never)
    with_free(monkeypatch, 5000)
    with pytest.raises(
        OutputError, match=r"6 KB are needed for .*task.kd, and .*out has 5 KB free"
    ) as caught:
        squeeze(budget=6000)
    assert "give a folder with -o on a larger disk" in caught.value.fix
    with pytest.raises(OutputError, match=r"20 KB are needed for .*task.kd"):  # the usual budget
        squeeze()
    monkeypatch.setattr(os, "access", lambda path, mode: path == Path("out"))  # as a full quota is
    with pytest.raises(OutputError, match=r"out cannot be written to, and .*task.kd would lie"):
        squeeze(method=Lora(rank=1))


@pytest.mark.parametrize("method", [Lora(rank=2), UniLora(bases=300), None])
def test_the_state_of_a_run_is_counted_before_the_training(
    here: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    """What is asked for holds the state and the file, and is at most twice as much."""
    asked: list[Need] = []
    sizes: list[int] = []
    save = states.save

    def seen(path: Path, *rest: Any) -> None:
        save(path, *rest)
        sizes.append(path.stat().st_size)

    def kept(job: Any, *, learns: bool) -> tuple[Need, ...]:
        found = disk.needs_of(job, learns=learns)
        asked.extend(found)
        return found

    monkeypatch.setattr(states, "save", seen)
    monkeypatch.setattr(steps, "KEPT_EVERY_S", 0.0)
    monkeypatch.setattr(compressing, "needs_of", kept)
    squeeze(**({"budget": 6000} if method is None else {"method": method}))
    file, state = asked[:2]
    written = Path("out/task.kd").stat().st_size
    assert file.path == Path("out/task.kd")
    assert written <= file.nbytes <= written + 1500
    assert state.path == Path("out/task.kd.resume")
    assert max(sizes) <= state.nbytes / 2 <= 2 * max(sizes) + disk.TEXTS


def test_a_disk_that_holds_the_file_but_not_its_state(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressing, "_distil", never)
    with_free(monkeypatch, 30_000)
    with pytest.raises(OutputError, match=r"task.kd \(.* KB\), the state of its run \(.*\), and"):
        squeeze(budget=6000)
    with pytest.raises(OutputError, match=r"its trials \(16.4 KB\), and"):
        squeeze(budget=6000, tune=0.1)
    assert not any((here / "out").iterdir())


def test_a_teacher_cache_is_asked_for_with_what_lies_on_its_disk(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone would fit."""
    monkeypatch.setattr(compressing, "_learn", never)
    asked = []

    def seen(job: Any, *, learns: bool) -> tuple[Need, ...]:
        found = disk.needs_of(job, learns=learns)
        asked.append(sum(need.nbytes for need in found))
        return found

    monkeypatch.setattr(compressing, "needs_of", seen)
    with pytest.raises(AssertionError, match=r"began"):
        squeeze(budget=6000)
    with_free(monkeypatch, asked[0] + 100)
    with pytest.raises(
        OutputError, match=r"the teacher's outputs .*, task.kd .*, the state"
    ) as caught:
        squeeze(budget=6000, teacher_cache="cache")
    assert "--teacher-cache" in caught.value.fix
    assert not list(Path("cache").glob("*"))
    with_free(monkeypatch, asked[0] + 100_000)
    with pytest.raises(AssertionError, match=r"began"):
        squeeze(budget=6000, teacher_cache="cache")
    with_free(monkeypatch, asked[0])  # all of it is there
    with pytest.raises(AssertionError, match=r"began"):
        squeeze(budget=6000, teacher_cache="cache")


def test_a_curve_is_asked_for_whole(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(planning, "draw_curve", never)
    options = Options(steps=4, batch=8)

    def drawn(curve: str) -> None:
        plan("base", "tuned", inputs="texts.txt", out="curve", curve=curve, options=options)

    with_free(monkeypatch, 9000)
    with monkeypatch.context() as still:
        still.setattr(planning, "prepare", never)
        with pytest.raises(OutputError, match=r"10 KB are needed for the curve's files"):
            drawn("4KB,6KB")
    with_free(monkeypatch, 20_000)
    with pytest.raises(
        OutputError, match=r"2 files .*, the state of a run .*, the teacher's outputs"
    ):
        drawn("4KB,6KB")
    assert not Path("curve").exists()
    with_free(monkeypatch, 10**6)
    with pytest.raises(AssertionError, match=r"began"):
        drawn("4KB,6KB")
