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
from tests.doubles import numpy_device
from tests.support import grids, pico
from tests.support.making import delta, write
from tests.support.processes import GOLDEN

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("gguf")
pytest.importorskip("cryptography")
pytest.importorskip("securesystemslib")
pytest.importorskip("tuf")
from kilodelta.device import release
from kilodelta.device.update.trust import pins_from, write_pins
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.trust import keygen

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
    patterns = Patterns(include=("model.layers.*_proj.weight",))
    delta(pico.llama(folder / "llama"), Lora(rank=2), patterns=patterns).save(folder / "chat.kd")
    _quantised(folder)
    _device(folder)
    return folder


def _quantised(folder: Path) -> None:
    """`w4/`, whose one matrix is the one that `small.kd` changes in `small.safetensors`."""
    numbers = grids.Numbers(16, 32, 32)
    grids.folder(folder / "w4", grids.CT, grids.pack_quantized("a", numbers))
    base = write(folder / "small.safetensors", {"a.weight": ("F32", (16, 32), bytes(4 * 512))})
    delta(base, Lora(rank=2), patterns=Patterns(include=("*.weight",))).save(folder / "small.kd")


def _device(folder: Path) -> None:
    """A device folder that pins a key, and a signed release for it."""
    base = numpy_device.base(folder / "linear.safetensors")
    keys = [keygen(folder / name) for name in ("team", "second")]
    numpy_device.folder(folder / "device", base)
    pins = pins_from([keys[0].public], threshold=1, task="", kind="")
    assert pins is not None
    write_pins(folder / "device" / "trust.json", pins)
    numpy_device.delta(base, 7).save(folder / "raw.kd")
    signing = {"sign": [keys[0].private], "task": "intents"}
    release(base, folder / "raw.kd", folder / "task-7.kd", version=7, **signing)  # type: ignore[arg-type]


LINES = {
    "compress": "compress base tuned -o out --inputs texts.txt --budget 4KB --batch 4",
    "import": "import adapter --base base -o out",
    "rebase": "rebase w4 small.kd -o out",
    "merge": "merge base task.kd -o out",
    "export": "export base task.kd -o out",
    "export-peft": "export-peft base task.kd -o out",
    "export-adapter": "export-adapter base task.kd -o out",
    "export-gguf": "export-gguf llama chat.kd -o out",
    "export-edge-llm": "export-edge-llm llama chat.kd -o out",
    "bundle": "bundle base -o out --mode adapter",
    "release": "release base task.kd -o out --version 7",
    "apply": "apply device task-7.kd",
    "keygen": "keygen out",
    "trust": "trust device --add second.pub --by team.key -o out",
    "publish": "publish task-7.kd --repository out --key team.key",
    "fleet run": "fleet run fleet.toml -o out",
}
WRITES = {"apply": ["device"], "keygen": ["out.key", "out.pub", "out.p256.key", "out.p256.pub"]}
"""What a line would write where that is not `out`."""
WITHOUT = {
    "card": "prints the card where no -o is given",
    "demo": "writes a new folder with made data, and nothing else",
    "diff": "writes nothing",
    "digest": "writes nothing",
    "doctor": "writes nothing",
    "fleet plan": "is the rehearsal of fleet run",
    "fleet report": "writes one page about what is there",
    "fleet status": "writes that page where it is asked for",
    "inspect": "writes nothing",
    "plan": "is the rehearsal of compress, and without --curve that of itself with it",
    "pull": "is the rehearsal of pull --apply: what is served stays",
    "rollback": "goes back to what status shows, and apply goes forward again",
    "run": "computes at once",
    "status": "writes nothing but metrics",
    "verify": "writes a report about what is there",
}
"""Commands that need no `--dry-run`, and why."""


def named(command: click.Command) -> bool:
    return any("--dry-run" in option.opts for option in command.params)


def test_every_command_with_the_option_is_tried_here() -> None:
    commands = {
        f"{name} {inner}".strip(): command
        for name, outer in main.commands.items()
        for inner, command in getattr(outer, "commands", {"": outer}).items()
    }
    assert {name for name, command in commands.items() if named(command)} == set(LINES)
    assert set(commands) == {*LINES, *WITHOUT}


@pytest.mark.parametrize("line", LINES.values(), ids=list(LINES))
def test_a_dry_run_says_what_it_would_write_and_writes_nothing(
    line: str, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = WRITES.get(line.split()[0], ["out"])
    monkeypatch.chdir(desk)
    before = sorted(desk.rglob("*"))
    result = CliRunner().invoke(main, [*line.split(), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    shown: dict[str, Any] = json.loads(result.stdout)
    if not line.startswith("fleet"):
        assert (shown["dry_run"], shown["writes"]) == (True, writes)
        assert shown["facts"]
    assert sorted(desk.rglob("*")) == before
    people = CliRunner().invoke(main, [*line.split(), "--dry-run"])
    assert (f"would write  {writes[0]}" in people.stdout) or line.startswith("fleet")


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
        ("rebase w4 task.kd -o out", 5),
        ("export-peft base task.kd -o tuned", 8),
        ("export-adapter tuned task.kd -o out", 5),
        ("export-adapter base task.kd -o tuned", 8),
        ("export-gguf llama chat.kd -o texts.txt", 8),
        ("export-edge-llm llama chat.kd -o tuned", 8),
        ("apply device raw.kd", 16),
        ("keygen team", 8),
        ("trust device --add second.pub --by second.key", 16),
        ("publish raw.kd --repository out --key team.key", 16),
        ("publish nothing.kd --repository out --key team.key", 9),
        ("bundle base -o out --mode patch --blocks qdq", 9),
    ],
)
def test_a_dry_run_fails_as_the_command_would(
    line: str, code: int, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(desk)
    before = sorted(desk.rglob("*"))
    result = CliRunner().invoke(main, [*line.split(), "--dry-run"])
    assert result.exit_code == code, result.output
    assert sorted(desk.rglob("*")) == before


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
