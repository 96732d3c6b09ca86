"""The frame of the command line: what every command's help says, and how every command ends."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kilodelta import cli, terminal
from kilodelta.cli import SECTIONS, main
from kilodelta.commands.common import Command
from kilodelta.errors import KiloDeltaError, printable
from kilodelta.progress import Event

COMMANDS = sorted(
    (f"{name} {inner}".strip(), command)
    for name, outer in main.commands.items()
    for inner, command in getattr(outer, "commands", {"": outer}).items()
)
"""Every command by its whole name; those of a group by the group's and their own."""


def help_of(*names: str) -> str:
    result = CliRunner().invoke(main, [*" ".join(names).split(), "--help"])
    assert result.exit_code == 0, result.output
    return result.output


def test_help_answers_at_once() -> None:
    """The least of five runs: others may keep the machine busy."""
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "kilodelta", "--help"], check=True, stdout=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3, spent


def test_help_lists_each_command_once_by_section_in_full() -> None:
    shown = " ".join(help_of().split())
    listed = [command for commands in SECTIONS.values() for command in commands]
    assert len(listed) == len(set(listed)) == len(main.commands)
    for title in SECTIONS:
        assert f"{title}:" in shown
    for command in listed:
        assert f"{command.name} {command.short_help}" in shown
    assert "..." not in shown.partition("Options:")[2]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_a_summary_fits_into_one_line_of_a_terminal(name: str, command: click.Command) -> None:
    assert command.short_help is not None
    assert command.short_help.endswith(".")
    width = max(map(len, main.commands))
    group = name.split()[:-1]
    assert any(line.endswith(command.short_help) for line in help_of(*group).splitlines()), width


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_option_has_a_help_text_and_shows_its_default(
    name: str, command: click.Command
) -> None:
    shown = " ".join(help_of(name).split())
    for option in command.params:
        if not isinstance(option, click.Option):
            continue
        assert option.help, f"{name} {option.opts[0]}"
        assert option.help.endswith("."), f"{name} {option.opts[0]}"
        default = option.to_info_dict()["default"]
        if default not in (None, False, "", ()) and not option.required:
            values = default if isinstance(default, (list, tuple)) else [default]
            assert f"[default: {', '.join(map(str, values))}" in shown, f"{name} {option.opts[0]}"
    assert '[default: ""' not in shown


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_examples_are_command_lines_that_parse(name: str, command: click.Command) -> None:
    assert isinstance(command, Command)
    assert command.examples
    shown = help_of(name).splitlines()
    for example in command.examples:
        assert f"  {example}" in shown
        program, *words = example.split()
        called, arguments = words[: len(name.split())], words[len(name.split()) :]
        assert (program, " ".join(called)) == ("kilodelta", name)
        command.make_context(name, arguments)  # a usage error raises


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_command_shows_that_it_is_at_work(name: str, command: click.Command) -> None:
    assert any("--quiet" in option.opts for option in command.params)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stage", ["", "merge"])
def test_a_terminal_moves_before_a_second_of_silence(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = _Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminal, "SILENCE", 0.05)
    with terminal.progress(quiet=False) as progress:
        for _ in range(100):
            if "working" in screen.getvalue():
                break
            time.sleep(0.05)
        assert "working" in screen.getvalue()
        if stage:
            progress(Event(stage=stage, done=1, total=1, unit="tensors"))
    last = re.split(r"\x1b\[2K", screen.getvalue())[-1]
    assert "working" not in last  # what is left when it is over
    assert stage in last


def test_a_quick_answer_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = _Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with terminal.progress(quiet=False):
        pass
    assert screen.getvalue() == ""


def test_a_command_that_is_not_there_is_refused() -> None:
    result = CliRunner().invoke(main, ["aply"])
    assert result.exit_code == 2
    assert "No such command 'aply'" in result.output
    assert "apply" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["digest", ""],
        ["merge", "a", "", "-o", "b"],
        ["merge", "a", "b", "-o", ""],
        ["verify", "a", "b", "c", ""],
        ["status", ""],
        ["fleet", "status", ""],
        ["trust", "a", "--add", "b", "--add", ""],
    ],
)
def test_an_empty_path_is_not_the_working_directory(arguments: list[str]) -> None:
    """As a script gives it whose variable is not set."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "an empty text is no path" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "a", "b", "-o", "c", "--min-agreement", "nan"],
        ["compress", "a", "b", "-o", "c", "--lr", "nan"],
        ["merge", "a", "b", "-o", "c", "--min-changed", "nan"],
        ["bundle", "a", "-o", "b", "--mode", "patch", "--ceiling", "nan"],
    ],
)
def test_nan_is_no_limit(arguments: list[str]) -> None:
    """Nothing is below it, so nothing would be refused."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "NaN is no number" in result.output


class TestEnds:
    """What ends a command: an error, Ctrl-C, or a signal."""

    @pytest.fixture
    def ending(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        """Run a command `probe` that does something."""

        def ending(act: Callable[[], object], *arguments: str) -> Any:
            from kilodelta.commands.common import as_json

            @click.command(cls=Command, short_help="Probe.")
            @as_json
            def probe(as_json: bool) -> None:
                act()

            monkeypatch.setitem(main.commands, "probe", probe)
            return CliRunner().invoke(main, ["probe", *arguments])

        return ending

    def test_an_error_is_a_sentence_a_fix_and_a_code(self, ending: Any) -> None:
        def fail() -> None:
            raise KiloDeltaError("it broke", fix="mend it")

        result = ending(fail)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "error: it broke\n  fix: mend it\n"

    def test_with_json_the_error_is_a_document(self, ending: Any) -> None:
        def fail() -> None:
            raise KiloDeltaError("it \x1b[31mbroke", fix="mend it")

        result = ending(fail, "--json")
        assert json.loads(result.stdout) == {"error": r"it \x1b[31mbroke", "fix": "mend it"}
        assert "error: it" in result.stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ["merge", "--json"],
            ["merge", "a", "b", "-o", "c", "--threads", "none", "--json"],
            ["inspect", "--json", "--no-such-option"],
            ["fleet", "run", "--jobs", "-1", "--json"],
            ["aply", "--json"],
        ],
    )
    def test_with_json_misspelt_arguments_are_a_document(self, arguments: list[str]) -> None:
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        document = json.loads(result.stdout)
        assert document["error"] in result.stderr.replace("\n", " ")
        assert document["fix"].endswith(" --help")

    def test_a_file_called_json_does_not_ask_for_json(self, tmp_path: Path) -> None:
        result = CliRunner().invoke(main, ["inspect", "--", "--json"])
        assert (result.exit_code, result.stdout) == (3, "")

    def test_ctrl_c_exits_130(self, ending: Any) -> None:
        def stop() -> None:
            raise KeyboardInterrupt

        result = ending(stop, "--json")
        assert result.exit_code == 130
        assert "error: interrupted" in result.stderr
        assert json.loads(result.stdout)["error"] == "interrupted"

    @pytest.mark.parametrize("resumes", [True, False])
    def test_what_can_be_resumed_is_said_to_be(
        self, resumes: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(**named: object) -> None:
            raise KeyboardInterrupt

        options = [click.Option(["--resume"], is_flag=True)] if resumes else []
        probe = Command("probe", callback=stop, params=options, short_help="Probe.")
        monkeypatch.setitem(main.commands, "probe", probe)
        result = CliRunner().invoke(main, ["probe"])
        assert result.exit_code == 130
        assert ("--resume" in result.stderr) is resumes

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
    def test_a_signal_ends_a_command_as_ctrl_c_does(
        self, ending: Any, number: int, code: int
    ) -> None:
        cleared = []

        def stop() -> None:
            try:
                os.kill(os.getpid(), number)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), number)  # a second one is not heard while clearing up
                cleared.append(True)

        before = signal.getsignal(number)
        assert ending(stop).exit_code == code
        assert cleared == [True]
        assert signal.getsignal(number) is before

    def test_a_signal_that_is_ignored_stays_so(
        self, ending: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        try:
            assert ending(lambda: os.kill(os.getpid(), signal.SIGHUP)).exit_code == 0
        finally:
            signal.signal(signal.SIGHUP, before)


HOSTILE = "\x1b]0;x\x07\x1b[2J\rproved\n\x9b31m\u202e\ud800"


def is_safe(text: str) -> bool:
    return all(c == "\n" or c.isprintable() for c in text)


def test_texts_of_files_reach_the_terminal_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_facts([("base", HOSTILE), (HOSTILE, "é漢 [bold]")])
    terminal.print_table(HOSTILE, [HOSTILE], [[HOSTILE]])
    terminal.print_json({HOSTILE: [HOSTILE]})
    terminal.print_line(HOSTILE)
    terminal.print_error(HOSTILE, HOSTILE)
    terminal.print_warning(HOSTILE)
    shown = capsys.readouterr()
    assert is_safe(shown.out)
    assert is_safe(shown.err)
    assert "é漢 [bold]" in shown.out
    assert shown.out.count("\n") >= 3


def test_json_says_what_the_text_was(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"name": HOSTILE})
    assert json.loads(capsys.readouterr().out) == {"name": HOSTILE}
    terminal.print_json({"name": "é漢"})
    assert "é漢" in capsys.readouterr().out


def test_a_long_text_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_facts([("name", "x" * 900_000)])
    assert len(capsys.readouterr().out) < 1100


def test_an_error_is_escaped_and_cut_where_it_is_made() -> None:
    error = KiloDeltaError(f"the base {HOSTILE}" + "x" * 900_000, fix=f"see {HOSTILE}")
    assert is_safe(str(error))
    assert len(str(error)) < 5000
    assert "more characters" in error.what


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\r", r"a\tb\r"),
        ("\x7f\x80\x9b", r"\x7f\x80\x9b"),
        ("\u2028\u200b\ufeff", r"\u2028\u200b\ufeff"),
        ("\U000e0001", r"\U000e0001"),
        ("\udcff", r"\udcff"),
        ("a\u00a0\u3000é😀", "a\u00a0\u3000é😀"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_command_imports_more_than_click_before_it_runs() -> None:
    heavy = {"numba", "numpy", "rich", "torch", "safetensors", "onnxruntime", "transformers"}
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom kilodelta.cli import main\n"
        "for name in main.commands:\n"
        "    assert CliRunner().invoke(main, [name, '--help']).exit_code == 0\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_handlers_are_left_alone_outside_the_main_thread() -> None:
    import threading

    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(CliRunner().invoke(main, ["inspect", "absent"]).exit_code)
    )
    thread.start()
    thread.join()
    assert codes == [3]
    assert cli.SECTIONS is SECTIONS
