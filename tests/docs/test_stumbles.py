"""Where first users stumbled, and what each sees now: a sentence that names the way out.

Those that are answered by a page, a table or a heading are held by the tests beside that page.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kilodelta.cli import main
from tests.support.processes import GOLDEN, ROOT

BASE, FILE = str(GOLDEN / "base.safetensors"), str(GOLDEN / "nola-8.kd")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what users have lying about."""
    (tmp_path / "texts.txt").write_text("a text\nanother\n")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "model").mkdir()
    shutil.copy(BASE, tmp_path / "model" / "model.safetensors")
    (tmp_path / "many").mkdir()
    shutil.copy(FILE, tmp_path / "many" / "task.kd")
    shutil.copy(BASE, tmp_path / "base.safetensors")
    shutil.copy(FILE, tmp_path / "task.kd")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("desk")
@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("digest old", "pytorch_model.bin, a PyTorch pickle", "model.save_pretrained(FOLDER)"),
        ("digest org/name", "neither a file nor a folder here", "hf:org/name"),
        ("digest adapter", "the folder of a PEFT adapter", "kilodelta import adapter --base BASE"),
        ("inspect texts.txt", "it is a text file", "given as --inputs"),
        ("inspect adapter", "the folder of a PEFT adapter", "kilodelta import adapter --base BASE"),
        ("inspect base.safetensors", "no .kd file", "kilodelta digest base.safetensors"),
        ("inspect model", "the folder of a model, no .kd file", "kilodelta digest model"),
        ("merge task.kd model -o x", "the folder of a model", "stands behind its BASE"),
        ("inspect many", "many is a folder, no .kd file", "give many/task.kd"),
        ("fleet status nothing", "cannot be read", "the folder of results"),
        ("merge base.safetensors adapter -o x", "a PEFT adapter", "kilodelta import adapter"),
        (
            "compress base.safetensors adapter -o x.kd --inputs texts.txt",
            "PEFT adapter",
            "kilodelta import",
        ),
        ("run device --inputs texts.txt", "holds texts; arrays are wanted", "numpy.savez"),
        ("export base.safetensors task.kd -o x --peft", "is a command", "kilodelta export-peft"),
        ("status texts.txt", "is not a device folder", "kilodelta bundle BASE"),
    ],
)
def test_an_error_says_what_was_given_and_what_to_do(line: str, what: str, fix: str) -> None:
    result = CliRunner().invoke(main, line.split())
    assert result.exit_code not in (0, 1), result.output
    error, _, way = result.stderr.partition("\n  fix: ")
    assert what in error
    assert fix in way
    assert "claims" not in error  # of a header's bytes
    assert "safe_serialization" not in way  # transformers 5 has no such option


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("compress.md", ("--exclude", "--lr", "--batch", "--held-out", "--steps", "--seed")),
        ("cli.md", ("--rows", "--cached", "--held-out", "--batch")),
        ("import.md", ("compatibility",)),
        ("methods.md", ("nola", "randlora", "lora", "vera", "uni-lora")),
        ("concepts.md", ("twin", "root", "probe", "parity", "agreement", "divergence")),
    ],
)
def test_a_page_says_what_was_nowhere(page: str, words: tuple[str, ...]) -> None:
    text = (ROOT / "docs" / page).read_text().lower()
    assert [word for word in words if word not in text] == []


def test_the_cache_is_on_a_page() -> None:
    pages = " ".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert "KILODELTA_CACHE" in pages


def test_words_that_stopped_readers_are_gone() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = " ".join(page.read_text().split())
        for words in (
            "opponent",
            "There, by hand",
            "next to nothing else running",
            "roved by a twin of unique random values",
        ):
            assert words not in text, page.name


def test_readme_says_in_which_folder_each_block_runs() -> None:
    """One began with `cd kilodelta-demo`, and the next one needed the clone."""
    text = (ROOT / "README.md").read_text()
    assert "cd " not in text
    before, _, _ = text.partition("kilodelta inspect tests/golden")
    assert before.rstrip("`\n ").endswith("In the clone:")
    before, _, _ = text.partition("kilodelta compress base tuned -o mine.kd")
    assert before.rstrip("`\n ").endswith("The same by hand, in that folder:")


def test_a_graph_of_too_low_a_rank_names_the_command_that_makes_another() -> None:
    from types import SimpleNamespace
    from typing import cast

    from kilodelta.export.adapter.fit import too_high
    from kilodelta.export.adapter.layout import AdapterLayout

    error = too_high(20, cast(AdapterLayout, SimpleNamespace(rank=8)))
    assert "kilodelta bundle --rank 20" in error.fix


def test_labels_are_refused_before_parity_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier makes no embeddings to compare with; the runs were done and thrown away."""
    pytest.importorskip("torch")
    from types import SimpleNamespace
    from typing import Any, cast

    from kilodelta.errors import InputError
    from kilodelta.verify.options import VerifyOptions
    from kilodelta.verify.parity import bench

    pair = SimpleNamespace(base=SimpleNamespace(pooling=None))
    monkeypatch.setattr(bench, "open_pair", lambda *_: pair)
    monkeypatch.setattr(bench, "Bench", None)
    options = VerifyOptions(inputs="texts.txt", labels="labels.txt", against="tuned")
    with pytest.raises(InputError, match="labels are compared with sentence embeddings"):
        bench.compare_outputs(cast(Any, None), options, lambda event: None)


def test_a_result_worse_than_none_does_not_end_in_a_calm_table() -> None:
    from kilodelta.report import verdict_of

    for before, after in ((1.0, 0.0), (0.9, 0.2), (1.0, 0.99)):
        judged = verdict_of({"before": {"agreement": before}, "after": {"agreement": after}})
        assert judged.level == "red"
        assert "worse than the base" in judged.text
    nothing = verdict_of({"before": {"agreement": 1.0}, "after": {"agreement": 1.0}})
    assert nothing.level == "amber"


def test_devices_take_compatibility_forms_and_the_page_says_so() -> None:
    text = " ".join((ROOT / "docs" / "import.md").read_text().split())
    assert "Devices take a form as it is, in patch mode" in text


def test_a_page_says_which_method_to_take() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    assert text.startswith("# Which method?\n\n**Leave it to `--budget`.**")
    assert "docs/methods.md" in (ROOT / "README.md").read_text()


def test_every_option_says_what_it_is() -> None:
    for name in ("compress", "release", "digest"):
        for option in main.commands[name].params:
            if isinstance(option, click.Option):
                assert option.help, option.name


def test_nothing_asks_for_a_package_that_no_index_has() -> None:
    for place in (ROOT, ROOT / "docs", ROOT / "kilodelta", ROOT / "export", ROOT / "verify"):
        found = place.rglob("*.py") if place != ROOT else place.glob("*.md")
        for path in (*found, *place.glob("*.md")):
            bad = re.search(r"pip install ['\"]?kilodelta", path.read_text())
            assert bad is None, path
