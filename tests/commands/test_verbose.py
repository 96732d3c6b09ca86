"""`--verbose`, the library's loggers, and shell completion."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import kilodelta
from kilodelta import terminal
from kilodelta.cli import main
from tests.support.processes import GOLDEN, ROOT, run

BASE, FILE = str(GOLDEN / "base.safetensors"), str(GOLDEN / "nola-8.kd")


def test_verbose_prints_what_the_library_logs_on_stderr(tmp_path: Path) -> None:
    logger = logging.getLogger("kilodelta")
    before = logger.level, list(logger.handlers)
    line = ["merge", BASE, FILE, "-o", str(tmp_path / "a.safetensors"), "-q"]
    result = CliRunner().invoke(main, [*line, "--verbose"])
    assert result.exit_code == 0, result.output
    assert "kilodelta.export.merge.checkpoint: merge " in result.stderr
    assert "4 tensors, by nola" in result.stderr
    assert "kilodelta.export" not in result.stdout
    assert (logger.level, logger.handlers) == before
    line[4] = str(tmp_path / "b.safetensors")
    assert "kilodelta.export" not in CliRunner().invoke(main, line).stderr


def test_a_program_hears_the_library_by_its_own_handlers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "kilodelta"):
        kilodelta.merge(BASE, FILE, tmp_path / "out.safetensors")
    assert any(record.name.startswith("kilodelta.export.merge") for record in caplog.records)


def test_the_library_adds_no_handler() -> None:
    assert run("import logging, kilodelta.cli; print(logging.getLogger('kilodelta').handlers)") in (
        "[]\n"
    )


def test_what_is_logged_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    stop = terminal.log_to_stderr(logging.INFO)
    try:
        logging.getLogger("kilodelta.test").info("base %s", "\x1b[2J")
    finally:
        stop()
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("kilodelta mer", "merge"),
        ("kilodelta fleet pl", "plan"),
        ("kilodelta merge --dry", "--dry-run"),
        ("kilodelta compress --method ran", "randlora"),
    ],
)
def test_bash_completes(typed: str, wanted: str) -> None:
    words = typed.split()
    told = {"_KILODELTA_COMPLETE": "bash_complete", "COMP_WORDS": typed}
    told["COMP_CWORD"] = str(len(words) - 1)
    done = subprocess.run(
        [sys.executable, "-c", "from kilodelta.cli import main; main(prog_name='kilodelta')"],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT.parent,
    )
    assert f"plain,{wanted}" in done.stdout.split(), done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_line_of_each_shell_makes_a_script(shell: str) -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert f"_KILODELTA_COMPLETE={shell}_source kilodelta" in page
    result = CliRunner().invoke(
        main, prog_name="kilodelta", env={"_KILODELTA_COMPLETE": f"{shell}_source"}
    )
    if "Couldn't detect Bash version" in result.output or shutil.which("bash") is None:
        pytest.skip("click asks bash for its version, and there is none")
    assert "kilodelta" in result.output
    assert "complete" in result.output
