"""The journal: what was done, bounded, and never without the state that stands."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kilodelta.device import apply, rollback, status
from kilodelta.device.folder import journal
from kilodelta.device.folder.journal import LIMIT, LINE, Journal, last_state
from kilodelta.device.folder.state import Served, State
from kilodelta.errors import FileError, OutputError
from tests.support.devices import Bench

HOSTILE = "\x1b[2J\rproved\n\x9b\u202e\ud800"
STATE = State(
    sequence=4,
    highest=9,
    serving=Served(folder="000004-0123456789ab", delta="sha256:" + "01" * 32, version=9),
)


@pytest.fixture
def book(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal")


def test_entries_come_back_in_their_order(book: Journal) -> None:
    assert book.entries() == []
    book.append("proved", 1, version=7, nested={"list": [1, 2.5, None, True]})
    book.append("committed", 1, state=STATE.to_json())
    first, second = book.entries()
    assert (first["event"], first["sequence"], first["version"]) == ("proved", 1, 7)
    assert first["nested"] == {"list": [1, 2.5, None, True]}
    assert last_state([first, second]) == STATE
    assert last_state([first]) is None


def test_texts_are_escaped_and_cut(book: Journal) -> None:
    book.append("failed", 1, why=HOSTILE + "x" * 900_000, **{HOSTILE: [HOSTILE]})
    text = book.path.read_text()
    assert all(c == "\n" or c.isprintable() for c in text)
    assert text.count("\n") == 1
    assert len(text) < 1000
    assert book.entries()[0]["why"].startswith(r"\x1b[2J\rproved\n")


def test_an_entry_that_is_too_long_keeps_its_state(book: Journal) -> None:
    book.append(
        "committed", 4, state=STATE.to_json(), probe={f"output{i}": "x" for i in range(LINE)}
    )
    assert book.path.stat().st_size < LINE
    [entry] = book.entries()
    assert (entry["event"], entry["sequence"], "probe" in entry) == ("committed", 4, False)
    assert last_state([entry]) == STATE


def test_lines_of_others_are_passed_over(book: Journal) -> None:
    lines = [
        b'{"event":"proved","sequence":1}',
        b"",
        b"\xff\xfe",
        b"[1]",
        b'{"event":7}',
        b"{" * 9999,
    ]
    book.path.write_bytes(b"\n".join(lines) + b'\n{"event":"cut')
    assert [entry["event"] for entry in book.entries()] == ["proved"]


def test_repair_keeps_the_newest_half_and_whole_lines(book: Journal) -> None:
    line = json.dumps({"event": "built", "sequence": 1, "pad": "x" * 1000}).encode() + b"\n"
    count = LIMIT // len(line) + 10
    book.path.write_bytes(line * count + b'{"event":"cut')
    book.repair()
    size = book.path.stat().st_size
    assert LIMIT // 2 - len(line) < size <= LIMIT // 2
    assert size % len(line) == 0


def test_a_journal_that_is_short_and_whole_stays_as_it_is(book: Journal) -> None:
    book.append("proved", 1)
    before = book.path.stat()
    book.repair()
    assert book.path.stat().st_mtime_ns == before.st_mtime_ns
    assert book.path.stat().st_ino == before.st_ino


def test_however_many_lines_come_the_newest_state_stays(book: Journal) -> None:
    old = State(sequence=3, highest=3)
    book.append("committed", 3, state=old.to_json())
    book.append("committed", 4, state=STATE.to_json())
    filler = json.dumps({"event": "failed", "sequence": 5, "why": "x" * 500}).encode() + b"\n"
    for _ in range(3):
        with book.path.open("ab") as file:
            file.write(filler * (LIMIT // len(filler) + 1))
        book.repair()
        assert book.path.stat().st_size <= LIMIT // 2 + 1000
        assert last_state(book.entries()) == STATE


def test_a_state_among_the_newest_lines_is_not_kept_twice(book: Journal) -> None:
    book.append("committed", 3, state=State(sequence=3).to_json())
    with book.path.open("ab") as file:
        file.write(b'{"event":"failed"}\n' * (LIMIT // 19 + 1))
    book.append("committed", 4, state=STATE.to_json())
    book.repair()
    states = [entry for entry in book.entries() if "state" in entry]
    assert [last_state([entry]) for entry in states] == [STATE]


def test_a_line_of_a_megabyte_does_not_stay(book: Journal) -> None:
    book.append("committed", 4, state=STATE.to_json())
    with book.path.open("ab") as file:
        file.write(b'{"event":"' + b"x" * (2 * LIMIT - 600) + b'"}\n')
    book.repair()
    assert book.path.stat().st_size < 1000
    assert last_state(book.entries()) == STATE


def test_of_a_huge_journal_only_the_end_is_read(book: Journal) -> None:
    with book.path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room
        file.seek(0, 2)
        file.write(b"\n")
    book.append("committed", 4, state=STATE.to_json())
    assert last_state(book.entries()) == STATE
    book.repair()
    assert book.path.stat().st_size < LIMIT


def test_failed_applies_do_not_push_the_state_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`current` is lost after many refusals: the state is written anew from the journal."""
    monkeypatch.setattr(journal, "LIMIT", 3000)
    apply(bench.device, bench.files["a"])
    bad = bench.root / "bad.kd"
    bad.write_bytes(b"no .kd file")
    for _ in range(30):
        with pytest.raises(FileError):
            apply(bench.device, bad)
    assert (bench.device / "journal").stat().st_size < 6000
    (bench.device / "current").unlink()
    assert rollback(bench.device).before.serving.version == 0
    assert bench.serves() == "base"


def test_the_journal_does_not_grow_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LIMIT", 4000)
    sizes = []
    for _ in range(12):
        apply(bench.device, bench.files["b"])
        sizes.append((bench.device / "journal").stat().st_size)
    assert max(sizes) < 4000 + max(b - a for a, b in pairwise(sizes)) + 1
    assert sum(a > b for a, b in pairwise(sizes)) >= 2, "it was cut"
    assert bench.events()[-1] == "committed"
    assert bench.serves() == "b"


def test_a_part_of_a_line_at_the_end_is_removed(bench: Bench) -> None:
    place = bench.device / "journal"
    before = bench.entries()
    with place.open("ab") as file:
        file.write(b'{"at":"2026')
    assert bench.entries() == before
    apply(bench.device, bench.files["a"])
    events = bench.events()[len(before) :]
    assert events == ["proved", "built", "probed", "committed"]


def test_a_refusal_is_written_down_with_its_reason(bench: Bench) -> None:
    with pytest.raises(FileError):
        apply(bench.device, bench.root / "none.kd")
    entry = bench.entries()[-1]
    assert entry["event"] == "failed"
    assert "none.kd cannot be opened" in entry["why"]
    assert last_state([entry]) == State()


def refuse(*_: Any, **__: Any) -> None:
    raise OutputError("the journal cannot be written: full", fix="make room")


class TestAfterTheCommit:
    """Past the rename the fine-tune is served: whatever fails then is a warning."""

    @pytest.fixture
    def failing(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
        """A device whose journal takes no line of a commit."""
        real = Journal.append

        def append(self: Journal, event: str, sequence: int, **facts: Any) -> None:
            if event in ("committed", "rolled back"):
                refuse()
            real(self, event, sequence, **facts)

        apply(bench.device, bench.files["a"])
        monkeypatch.setattr(Journal, "append", append)
        return bench

    def test_apply_warns(self, failing: Bench) -> None:
        done = apply(failing.device, failing.files["b"])
        assert done.warnings == (
            "it is served, but not written down: the journal cannot be written: full",
        )
        assert failing.serves(check=True) == "b"
        assert status(failing.device).unfinished, "the last line says so, until the next command"

    def test_rollback_warns(self, failing: Bench) -> None:
        done = rollback(failing.device)
        assert len(done.warnings) == 1
        assert failing.serves() == "base"
        assert done.to_json()["warnings"] == list(done.warnings)

    def test_the_command_line_says_so_and_exits_0(self, failing: Bench) -> None:
        from click.testing import CliRunner

        from kilodelta.cli import main

        result = CliRunner().invoke(
            main, ["apply", str(failing.device), str(failing.files["b"]), "-q"]
        )
        assert result.exit_code == 0, result.output
        assert "warning: it is served, but not written down" in result.stderr
        assert "serving" in result.stdout

    def test_a_folder_that_cannot_be_synced_after_the_rename(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kilodelta.device.folder import change
        from kilodelta.device.folder.state import write_state

        def written(path: Path, after: State) -> None:
            write_state(path, after)
            raise OutputError(f"{path} cannot be written: Input/output error", fix="check")

        monkeypatch.setattr(change, "write_state", written)
        done = apply(bench.device, bench.files["a"])
        assert len(done.warnings) == 1
        assert "may be lost with the power" in done.warnings[0]
        assert bench.serves(check=True) == "a"
        assert bench.events()[-1] == "committed"

    def test_before_the_rename_it_is_an_error(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kilodelta.device.folder import change

        monkeypatch.setattr(change, "write_state", refuse)
        with pytest.raises(OutputError):
            apply(bench.device, bench.files["a"])
        assert bench.serves() == "base"
        assert bench.events()[-1] == "failed"

    def test_an_interrupt_between_rename_and_line_is_no_failure(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from kilodelta.device.folder import change
        from kilodelta.device.folder.state import write_state

        def stopped(path: Path, after: State) -> None:
            write_state(path, after)
            raise KeyboardInterrupt

        monkeypatch.setattr(change, "write_state", stopped)
        with pytest.raises(KeyboardInterrupt):
            apply(bench.device, bench.files["a"])
        assert bench.serves(check=True) == "a"
        assert bench.events()[-1] == "committed"
        assert not status(bench.device).unfinished
