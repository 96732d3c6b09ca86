"""Every fenced command of README and docs runs as it is written, or has a reason here why not.

The blocks of a page run in order, as one session in a folder of small models (tests/support/desk),
in this process. Distillation takes 8 steps where a page does not say how many.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from click.testing import CliRunner

from kilodelta.cli import main
from kilodelta.compress import Options
from tests.support import desk
from tests.support.pages import MADE, PAGES, Block, Line, blocks, heads
from tests.support.processes import ROOT

STEPS = 8

_INSTALLS = "installs packages: .ci/run does it on a bare machine"
_NO_GPU = "needs a GPU: kilodelta.verify.gpu proves it where there is one"
_SMALL = "the small update here rounds away in 4 bits: tests/grid/test_merge.py merges larger ones"
NOT_RUN = {
    ("README.md", "base + tuned ──"): "a picture",
    ("README.md", "pip install"): _INSTALLS,
    ("README.md", "pytest"): "this suite",
    ("README.md", "kilodelta rebase base-w4a16/"): "its task.kd is imported further down",
    ("README.md", "kilodelta merge  base-w4a16/"): _SMALL,
    ("README.md", "kilodelta export base-w4a16/"): _SMALL,
    ("README.md", "kilodelta demo"): "minutes, on a real model: tests/demo/test_demo.py",
    ("add_a_method.md", ""): "tests/format/test_add_a_method.py executes this page",
    ("bases.md", ""): "minutes, on real models of packages: run as written, by hand",
    ("decoders.md", "kilodelta "): "a real decoder: tests/export/test_decoder.py does it, tiny",
    ("decoders.md", "import onnxruntime_genai"): "the same test, by the same package",
    ("encoder-decoders.md", "kilodelta "): "a real Whisper: tests/export/test_seq2seq.py, tiny",
    ("encoder-decoders.md", "pip install"): "real bases of 150 MB, by hand",
    ("encoder-decoders.md", "import numpy"): "the same test, by HalvesWriter",
    ("encoder-decoders.md", "import onnxruntime_genai"): "the same test, by GenaiWriter",
    ("compress.md", "kilodelta plan BASE TUNED"): "minutes; tests/compress/test_plan.py",
    ("compress.md", "torchrun"): "several processes: tests/compress/test_ranks.py",
    ("demo.md", ""): "minutes, on a real model: tests/demo/test_demo.py holds its commands",
    ("export.md", "error: "): "messages; tests/export/test_tensorrt.py holds them",
    ("fleet.md", "kilodelta fleet plan   fleet.toml -o out/ --on ray"): (
        "a cluster's resources: tests/fleet/test_run.py, on a double"
    ),
    ("fleet.md", "kilodelta fleet run"): "minutes of training and engines: tests/fleet/test_run.py",
    ("fleet.md", "kilodelta fleet status out/"): "of a run: tests/fleet/test_run.py",
    ("fleet.md", "kilodelta fleet report out/"): "of a run: tests/fleet/test_run.py",
    ("patch.md", "kilodelta bundle  base/ -o device/ --mode patch --engine"): (
        "builds engines for minutes: tests/device/test_engine_patch.py"
    ),
    ("format.md", ""): "a manifest with holes, no command: tests/format/test_file.py",
    ("gpu.md", "pip install"): _INSTALLS,
    ("gpu.md", "kilodelta merge base/ task.kd -o merged/ --device cuda"): _NO_GPU,
    ("gpu.md", "python -m kilodelta.verify.gpu"): _NO_GPU,
    ("gpu.md", "pytest"): "this suite",
    ("import.md", "kilodelta import adapter/ --base clip/"): "tests/compress/test_import_places.py",
    ("import.md", "kilodelta import adapter/ --base base/ -o task.kd --prefix model.roberta"): (
        "tests/compress/test_import_places.py"
    ),
    ("import.md", "from safetensors.torch import save_file"): (
        "runs in official NOLA's own code, which is not here: tests/compress/test_import_nola.py"
    ),
    ("import.md", "kilodelta import model.5000.pt"): "tests/compress/test_import_nola.py",
    ("quantised.md", "kilodelta compress base.gguf"): "tests/grid/test_gguf_names.py",
    ("quantised.md", "kilodelta merge  base-w4a16/"): _SMALL,
    ("quantised.md", "kilodelta merge    base-w4a16/"): _SMALL,
    ("quantised.md", "kilodelta verify base-w4a16/"): _SMALL,
    ("quantised.md", "kilodelta export base-w4a16/"): _SMALL,
    ("quantised.md", "kilodelta export base-anew/"): _SMALL,
    ("quantised.md", "kilodelta apply   codes/"): _SMALL,
    ("quantised.md", "kilodelta release base-w4a16/ task-w4a16.kd -o task-8.kd"): _SMALL,
    ("quantised.md", "kilodelta apply   rtx/"): _SMALL,
    ("quantised.md", "kilodelta compress base/ tuned/ -o task.kd"): (
        "the desk's layers are narrower than a group: tests/compress/test_precisions.py"
    ),
    ("quantised.md", "kilodelta merge  base.gguf"): "a GGUF model: tests/grid/test_merge.py",
    ("quantised.md", "kilodelta merge  base.onnx"): "such a graph: tests/grid/test_merge.py",
    ("refit.md", ""): "needs a GPU and TensorRT: tests/export/test_refit.py, on a double",
    ("security.md", "python -m tests.fuzz"): "the fuzzer itself: tests/fuzz/test_fuzz.py",
    ("security.md", "pip install"): _INSTALLS,
    ("security.md", "kilodelta pull"): "a server of somebody's: tests/trust/test_mirror.py pulls",
    ("serving.md", "tritonserver"): "Triton Inference Server is not here",
    ("serving.md", "python3 -m venv"): _INSTALLS,
    ("serving.md", "venv/bin/pip install"): _INSTALLS,
    ("serving.md", "/usr/src/tensorrt/bin/trtexec"): "JetPack's own program",
}
"""By page and the beginning of a command or a block: why it does not run here."""

BEFORE: dict[str, tuple[str, ...]] = {
    "python.md": (
        "kilodelta bundle base/ -o device/ --mode adapter -q",
        "kilodelta release base/ task.kd -o task-7.kd --version 7 -q",
    ),
    "verify.md": (
        "kilodelta merge base task.kd -o merged -q",
        "kilodelta export base task.kd -o out -q",
    ),
}
"""Commands that a page takes for done."""

ABSENT = {
    "README.md": ("task.kd",),
    "compress.md": ("task.kd",),
    "import.md": ("task.kd",),
    "peft.md": ("task.kd",),
    "train.md": ("task.kd",),
}
"""Files of the desk that a page makes itself."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return desk.lay(tmp_path_factory.mktemp("desk"))


def reason(page: str, text: str) -> str | None:
    """Why a command or a block is not run, None if it is."""
    return next(
        (why for (at, start), why in NOT_RUN.items() if at == page and text.startswith(start)), None
    )


class Session:
    """One page: its folder and the names that its Python blocks share."""

    def __init__(self, folder: Path) -> None:
        self.names: dict[str, Any] = {"__name__": "page", **desk.names(folder)}

    def block(self, block: Block) -> None:
        if reason(block.page, block.text):
            return
        if block.language == "toml":
            Path("fleet.toml").write_text(block.text)
        elif block.language == "python":
            code = compile("\n" * block.line + block.text, block.page, "exec")
            exec(code, self.names)
        for line in block.commands():
            if line.is_usage:
                described(line)
            elif not reason(block.page, line.text):
                self.line(line)

    def line(self, line: Line) -> None:
        at = f"{line.block.page}, the block at line {line.block.line}: {line.text}"
        assert line.is_ours, f"{at}\nis not kilodelta's: give a reason in NOT_RUN"
        printed = run(line.text, at, error=line.error)
        if line.prints and not line.error:
            shown = heads(line.prints)
            assert heads(printed.splitlines()) == shown, f"{at}\nprints other facts than it shows"


def described(line: Line) -> None:
    """See that the options named in a description of a command exist."""
    command = main.commands[line.text.split()[1]]
    known = {name for option in command.params for name in option.opts}
    named = set(re.findall(r"(?<!\S)\[?(--?[a-z][a-z-]*)", line.text))
    assert named <= known, f"{line.block.page}: {line.text} names {named - known}"


def run(text: str, at: str, *, error: str = "") -> str:
    """Run a command, which succeeds, or fails with the error that the page shows.

    Returns:
        what it prints to standard output.
    """
    result = CliRunner().invoke(
        main, shlex.split(text)[1:], default_map={"compress": {"steps": STEPS}}
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(at) from result.exception
    if error:
        assert result.exit_code != 0, at
        assert error in result.stderr, f"{at}\n{result.stderr}"
    else:
        assert result.exit_code == 0, f"{at}\n{result.output}"
    return result.stdout


SLOW = {"deploy.md", "export.md", "python.md", "security.md", "serving.md", "verify.md"}
"""Pages whose commands trace a model several times; README has a command of each kind."""
NAMES = [
    pytest.param(page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])
    for page in PAGES
    if page.name not in MADE
]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_runs_as_it_is_written(
    name: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = next(page for page in PAGES if page.name == name)
    found = [block for block in blocks(page) if not reason(name, block.text)]
    if not found:
        pytest.skip("no block on this page runs")
    folder = desk.copy(made, tmp_path / "desk")
    defaults = Options.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "steps", STEPS)
    monkeypatch.chdir(folder / "many" if name == "fleet.md" else folder)
    for gone in ABSENT.get(name, ()):
        Path(gone).unlink()
    for text in BEFORE.get(name, ()):
        run(text, f"before {name}: {text}")
    session = Session(folder)
    for block in found:
        session.block(block)


def test_each_reason_is_of_something_on_its_page() -> None:
    """A reason for a command that is gone would hide the next one that begins like it."""
    texts = {
        page.name: [
            text
            for block in blocks(page)
            for text in (block.text, *(line.text for line in block.commands()))
        ]
        for page in PAGES
    }
    for (page, start), why in NOT_RUN.items():
        assert any(text.startswith(start) for text in texts[page]), (page, start)
        for named in re.findall(r"tests/[\w/.]+", why):
            assert (ROOT / named).is_file(), (why, "names a file of tests that is not there")


def test_a_command_that_fails_is_found(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.chdir(made)
    block = Block(page="x.md", line=1, language="", text="kilodelta inspect nothing.kd\n")
    with pytest.raises(AssertionError, match=r"x\.md, the block at line 1"):
        Session(made).block(block)
    file = "tests/golden/0.1.0/nola-8.kd"
    shown = f"$ kilodelta inspect {file}\nfile  {file}, 1.9 KB\nbase  golden\n"
    block = Block(page="x.md", line=1, language="", text=shown)
    with pytest.raises(AssertionError, match="prints other facts"):
        Session(made).block(block)
    with pytest.raises(AssertionError, match="give a reason"):
        Session(made).block(Block(page="x.md", line=1, language="", text="rm -r x\n"))
