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
        ("merge base.safetensors adapter -o x", "a PEFT adapter", "kilodelta import adapter"),
        ("run device --inputs texts.txt", "holds texts; arrays are wanted", "numpy.savez"),
        ("export base.safetensors task.kd -o x --peft", "a command now", "kilodelta export-peft"),
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
        for words in ("opponent", "There, by hand", "next to nothing else running"):
            assert words not in text, page.name


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
