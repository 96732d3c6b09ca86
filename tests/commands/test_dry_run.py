"""`--dry-run`: all checks, then what would be written, and nothing on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

import kilodelta
from kilodelta.cli import main
from kilodelta.errors import BaseMismatchError
from kilodelta.rehearsal import begin_work, dry_run
from tests.support import pico
from tests.support.making import delta
from tests.support.processes import GOLDEN

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns

BASE, FILE = GOLDEN / "base.safetensors", GOLDEN / "nola-8.kd"
FLEET = """version = 1
[base.mini]
path = "base"
[[fine-tunes]]
deltas = ["task.kd"]
[target.lora]
kind = "peft"
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its fine-tune, a `.kd`, an adapter, and a fleet's file."""
    peft = pytest.importorskip("peft")
    from tests.support import adapters

    folder = tmp_path_factory.mktemp("desk")
    base = pico.bert(folder / "base")
    pico.tuned(base, folder / "tuned")
    patterns = Patterns(include=("encoder.*.weight",), exclude=("*LayerNorm*",))
    delta(base, Lora(rank=2), patterns=patterns).save(folder / "task.kd")
    (folder / "texts.txt").write_text("\n".join(pico.TEXTS * 10))
    (folder / "fleet.toml").write_text(FLEET)
    config = peft.LoraConfig(r=2, target_modules=["query"])
    adapters.save(adapters.wrap(base, "bert", config), folder / "adapter")
    return folder


LINES = {
    "compress": "compress base tuned -o out --inputs texts.txt --budget 4KB --batch 4",
    "import": "import adapter --base base -o out",
    "merge": "merge base task.kd -o out",
    "export": "export base task.kd -o out",
    "bundle": "bundle base -o out --mode adapter",
    "release": "release base task.kd -o out --version 7",
    "fleet run": "fleet run fleet.toml -o out",
}


def named(command: click.Command) -> bool:
    return any("--dry-run" in option.opts for option in command.params)


def test_every_command_with_the_option_is_tried_here() -> None:
    commands = {
        f"{name} {inner}".strip(): command
        for name, outer in main.commands.items()
        for inner, command in getattr(outer, "commands", {"": outer}).items()
    }
    assert {name for name, command in commands.items() if named(command)} == set(LINES)


@pytest.mark.parametrize("line", LINES.values(), ids=list(LINES))
def test_a_dry_run_says_what_it_would_write_and_writes_nothing(
    line: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    before = sorted(desk.rglob("*"))
    result = CliRunner().invoke(main, [*line.split(), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    shown: dict[str, Any] = json.loads(result.stdout)
    if not line.startswith("fleet"):
        assert (shown["dry_run"], shown["writes"]) == (True, ["out"])
        assert shown["facts"]
    assert sorted(desk.rglob("*")) == before
    people = CliRunner().invoke(main, [*line.split(), "--dry-run"])
    assert ("would write  out" in people.stdout) or line.startswith("fleet")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("merge tuned task.kd -o out", 5),
        ("merge base task.kd -o tuned", 8),
        ("export base task.kd -o tuned", 8),
        ("export base task.kd -o out --tf32 --onnx", 9),
        ("compress base tuned -o task.kd --inputs texts.txt", 8),
        ("bundle base -o tuned --mode adapter", 8),
        ("release base task.kd -o texts.txt --version 7", 8),
    ],
)
def test_a_dry_run_fails_as_the_command_would(
    line: str, code: int, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    result = CliRunner().invoke(main, [*line.split(), "--dry-run"])
    assert result.exit_code == code, result.output


def test_a_block_ends_where_the_work_begins(tmp_path: Path) -> None:
    with kilodelta.dry_run() as rehearsed:
        kilodelta.merge(BASE, FILE, tmp_path / "out.safetensors")
        raise AssertionError("the function returned")
    assert rehearsed.is_reached
    assert rehearsed.writes == (tmp_path / "out.safetensors",)
    assert list(tmp_path.iterdir()) == []
    begin_work(tmp_path)  # outside a block it does nothing
    kilodelta.merge(BASE, FILE, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").exists()


def test_errors_leave_the_block(tmp_path: Path) -> None:
    other = GOLDEN.parent / "0.2.0" / "base.safetensors"
    with pytest.raises(BaseMismatchError), dry_run() as rehearsed:
        kilodelta.merge(other, FILE, tmp_path / "out.safetensors")
    assert not rehearsed.is_reached
