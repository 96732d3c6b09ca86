"""The command line: what it prints, its exit codes, its errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import kilodelta
from kilodelta import terminal
from kilodelta.cli import main
from kilodelta.errors import InputError, KiloDeltaError, MissingPackageError, require
from kilodelta.format.methods import Nola
from kilodelta.progress import Event
from tests.support.making import delta, folder, model, write

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    base = folder(tmp_path / "base", model(), 2)
    delta(base, Nola(rank=2, bases=9)).save(tmp_path / "task.kd")
    return tmp_path


def test_inspect(place: Path) -> None:
    result = run("inspect", place / "task.kd")
    assert result.exit_code == 0
    assert "nola: rank 2, bases 9, basis sign" in result.stdout
    assert "test/base, 8 tensors" in result.stdout
    assert "5: *.weight" in result.stdout
    found = json.loads(run("inspect", place / "task.kd", "--json").stdout)
    assert found["nbytes"]["file"] == (place / "task.kd").stat().st_size
    assert found["nbytes"]["coefficients"] == 5 * 2 * 9
    parts = [v for k, v in found["nbytes"].items() if k != "file"]
    assert sum(parts) == found["nbytes"]["file"]


def test_diff_of_files_says_whether_updates_were_compared() -> None:
    files = GOLDEN / "nola-8.kd", GOLDEN / "nola-16.kd"
    alone = run("diff", *files)
    assert alone.exit_code == 0
    assert "updates were not compared; give --base for that" in alone.stdout
    assert "0 are equal" not in alone.stdout
    assert "nola: rank 2, bases 131, basis sign" in run("inspect", files[0]).stdout
    other = run("diff", files[0], GOLDEN / "lora-8.kd").stdout
    assert "nola: rank 2, bases 131, basis sign" in other
    assert "lora: rank 3" in other
    beside = run("diff", *files, "--base", GOLDEN / "base.safetensors")
    assert "differ, " in beside.stdout
    assert "not compared" not in beside.stdout


def test_digest(place: Path) -> None:
    root = kilodelta.digest(place / "base").root
    assert run("digest", place / "base", "-q").stdout.split()[0] == root
    listed = run("digest", place / "base", "--tensors", "-q").stdout.splitlines()
    assert len(listed) == 9
    assert listed[-1] == f"{root}  (root)"
    assert json.loads(run("digest", place / "base", "--json", "--tensors").stdout)["count"] == 8


def test_merge_and_verify(place: Path) -> None:
    result = run("merge", place / "base", place / "task.kd", "-o", place / "out")
    assert result.exit_code == 0, result.output
    assert "5 tensors merged, 0 stored whole, 3 copied" in result.stdout
    proof = run("verify", place / "base", place / "task.kd", place / "out", "-q")
    assert proof.exit_code == 0
    assert "merged proved  sha256:" in proof.stdout
    found = json.loads(run("verify", place / "base", place / "task.kd", "--json").stdout)
    assert found["targets"] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["inspect", "absent.kd"], 3, "error: absent.kd cannot be opened: No such file"),
        (["inspect", str(GOLDEN / "base.safetensors")], 3, "metadata has not exactly the keys"),
        (["digest", "absent"], 4, "absent cannot be opened"),
        (["merge", "absent", str(GOLDEN / "lora-4.kd"), "-o", "x"], 4, "absent cannot be opened"),
        (["merge"], 2, "Missing argument 'BASE'"),
        (["unknown"], 2, "No such command"),
    ],
)
def test_errors_have_a_sentence_a_fix_and_a_code(
    arguments: list[str], code: int, text: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kilodelta", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    if code != 2:
        assert "\n  fix: " in done.stderr


def test_a_wrong_base_exits_5_and_says_so_in_json(place: Path) -> None:
    wrong = write(place / "wrong.safetensors", model(seed=9))
    done = subprocess.run(
        [sys.executable, "-m", "kilodelta", "verify", wrong, place / "task.kd", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5
    assert "is not the base of this file" in json.loads(done.stdout)["error"]


LONG = 300 * "x"


@pytest.mark.parametrize(
    "arguments",
    [
        ("digest", LONG),
        ("inspect", f"{LONG}.kd"),
        ("compress", "base", LONG, "-o", "t.kd", "--inputs", f"{LONG}.txt"),
        ("plan", LONG, LONG, "--inputs", f"{LONG}.txt"),
    ],
    ids=lambda given: given[0],
)
def test_a_path_that_is_too_long_is_a_sentence(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == InputError.exit_code
    assert "is too long for a path" in json.loads(result.stdout)["error"]


def test_every_error_has_its_own_code() -> None:
    kinds = KiloDeltaError.__subclasses__()
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    assert not {kind.exit_code for kind in kinds} & {0, 1, 2}


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(MissingPackageError) as caught:
        require("no_such_package", extra="cpu", why="run ONNX models")
    assert str(caught.value) == (
        "no_such_package is not installed; it is needed to run ONNX models\n"
        "  fix: in a clone of kilodelta: pip install '.[cpu]'"
    )


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (9500, "9.5 KB"), (2.1e9, "2.1 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert terminal.size(count) == text


def test_progress_without_a_terminal_is_a_line_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.progress(quiet=False) as show:
        for done in (1, 2):
            show(Event(stage="merge", done=done * 500, total=1000, unit="B"))
        show(Event(stage="distil", done=3, total=3, unit="steps", detail={"loss": 0.25}))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" after")[0] for line in lines] == [
        "merge: 1.0 KB of 1.0 KB",
        "distil: 3 of 3 steps",
    ]
    assert lines[1].endswith("loss 0.25")
