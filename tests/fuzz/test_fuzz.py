"""Damaged files of every surface: a sentence or a success, within bounds; and that this can fail.

The long form is `python -m tests.fuzz --count 10000`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from kilodelta.device import modes
from kilodelta.errors import InputError
from tests.fuzz.harness import Read, Surface, run
from tests.fuzz.mutations import bytes_changed, json_changed
from tests.fuzz.surfaces import SURFACES

COUNT = 25


SLOW = frozenset({"onnxruntime"})
"""Surfaces whose example takes long to make."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SURFACES]
)
def test_no_damaged_file_gives_a_traceback(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    surface = SURFACES[name]
    for package in surface.needs:
        pytest.importorskip(package)
    monkeypatch.setattr(modes, "OPENERS", dict(modes.OPENERS))  # surfaces put doubles there
    monkeypatch.setattr("tests.fuzz.harness.PLACES", 0.2)  # links and pipes in so few inputs
    shown: list[str] = []
    result = run(surface, COUNT, show=shown.append)
    assert result.is_clean, shown
    assert result.accepted + result.refused == COUNT


def raising(error: Callable[[], object]) -> Surface:
    """A surface whose reader does something whenever its file is damaged."""

    def make(example: Path, trusted: Path) -> Read:
        (example / "a.txt").write_bytes(b"valid")
        return lambda work: None if _is_valid(work / "a.txt") else error()

    return Surface(name="double", make=make, mutate={"*.txt": (bytes_changed,)})


def _is_valid(path: Path) -> bool:
    return path.is_file() and path.read_bytes() == b"valid"


def _raise(error: BaseException) -> None:
    raise error


def _spin() -> None:
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("fault", "field"),
    [
        (lambda: _raise(KeyError("x")), "tracebacks"),
        (lambda: _raise(SystemExit(1)), "tracebacks"),
        (lambda: _raise(InputError("x" * 20_000, fix="none")), "refused"),
        (lambda: bytearray(b"x") * (100 << 20), "over_memory"),
        (_spin, "hangs"),
    ],
)
def test_each_kind_of_fault_is_seen(
    fault: Callable[[], object], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.harness.SECONDS", 0.05)
    result = run(raising(fault), 2)
    assert getattr(result, field) == 2


def test_memory_is_seen_where_the_kernels_mark_cannot_be_set_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.fuzz.harness._reset_peak", lambda: False)
    assert run(raising(lambda: bytearray(b"x") * (100 << 20)), 2).over_memory == 2
    assert run(raising(lambda: _raise(InputError("no", fix="none"))), 2).is_clean


def test_a_control_character_in_a_message_is_a_fault() -> None:
    class LoudError(InputError):
        def __str__(self) -> str:
            return "\x1b[2J"

    result = run(raising(lambda: _raise(LoudError("", fix=""))), 1)
    assert result.tracebacks == 1


def test_an_input_follows_from_its_number() -> None:
    data = json.dumps({"a": [1, {"b": "text"}], "c": None}).encode()
    for mutate in (bytes_changed, json_changed):
        made = [[mutate(data, Random(f"s 0 {n}")) for n in range(300)] for _ in "ab"]
        assert made[0] == made[1]
        assert len(set(made[0])) > 150
