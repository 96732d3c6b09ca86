"""The documentation as a site: it builds without a network, every link leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import cli_page
from tests.support.processes import ROOT

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors that Markdown's toc makes of a page's headings."""
    toc = pytest.importorskip("markdown.extensions.toc")
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    heads = re.findall(r"^#+ (.+)$", text, flags=re.M)
    used: set[str] = set()
    return {
        toc.unique(toc.slugify(re.sub(r"[`*]|\]\([^)]*\)", "", head), "-"), used) for head in heads
    }


def test_the_command_page_is_what_the_command_line_says() -> None:
    assert cli_page.PLACE.read_text() == cli_page.page(), "run python -m tests.support.cli_page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    for link in LINK.findall(text):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else (page.parent / name).resolve()
        assert target.exists(), f"{page.name}: {link}"
        assert ROOT in target.parents or target == ROOT, f"{page.name}: {link} leaves the project"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """Without -q: with it, MkDocs 1.6 lets broken links pass."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md")))
    for page in pages:
        fetched = re.findall(r'(?:src|href)="(https?://[^"]+)"', page.read_text())
        scripts = [url for url in fetched if url.endswith((".js", ".css"))]
        assert scripts == [], page


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """The test above can fail: the same configuration, one page, one link to nowhere."""
    pytest.importorskip("mkdocs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# A\n\n[b](nowhere.md)\n")
    text = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(
        text[: text.index("nav:\n  - Start")] + "nav: [index.md]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
