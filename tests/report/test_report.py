"""Reports: what a page says, that it is inert and self-contained, and how a browser takes it."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kilodelta.errors import InputError, MissingPackageError
from kilodelta.report import plots, verdict_of, write_report
from kilodelta.report.html import Cell, Column, Page, Section, table
from kilodelta.report.verdict import kept_share
from kilodelta.sizes import byte_label

pytest.importorskip("matplotlib")

HOSTILE = "<script>alert(1)</script>&\"'"
LAYERS = [
    {"name": f"encoder.layer.{i}.{m}.weight", "relative_norm": 0.1 * (i + 1), "explained": 0.2}
    for i in range(3)
    for m in ("attention.query", "output.dense")
]
COMPRESS: dict[str, Any] = {
    "path": "task.kd",
    "method": {"name": "unilora", "rank": 4, "size": 23000},
    "bits": 4,
    "nbytes": {"file": 11984},
    "tuned_bytes": 90_900_000,
    "output": "labels",
    "kind": "top-1",
    "held_out": 278,
    "before": {"agreement": 0.468, "divergence": 1.1},
    "after": {"agreement": 0.967, "divergence": 0.11},
    "targets": 36,
    "extras": ["classifier.weight"],
    "dropped": ["lost.weight"],
    "dropped_energy": 0.031,
    "steps": 240,
    "seconds": 59.0,
    "interrupted": False,
    "result": "sha256:" + "3" * 64,
    "layers": LAYERS,
    "curve": [{"step": s, "agreement": 0.97 - 0.5 * math.exp(-s / 60)} for s in range(0, 240, 20)],
    "sizes": [
        {"name": "distilled", "nbytes": 4000, "agreement": 0.9},
        {"name": "distilled", "nbytes": 12000, "agreement": 0.967},
        {"name": "SVD int4", "nbytes": 12000, "agreement": 0.5},
    ],
    "commands": ["kilodelta compress base tuned -o task.kd --inputs train.jsonl"],
}
METRICS = {"relative_l2": 7.6e-7, "relative_max": 1e-6}
LIMIT = {"relative_l2": 3e-6, "relative_max": 4e-6}
CHECK = {
    "case": "usual",
    "shape": [4, 12],
    "output": "logits",
    "error": METRICS,
    "torch": METRICS,
    "limit": LIMIT,
    "passed": True,
}
RAN = {
    "artefact": "model.fp32.onnx",
    "runner": "onnxruntime-cpu",
    "precision": "float32",
    "status": "passed",
    "reasons": [],
    "departure": None,
    "update": {"logits": 1.0},
    "checks": [CHECK],
}
SILENT = {**RAN, "status": "not run", "reasons": ["no NVIDIA driver"], "checks": [], "update": {}}
VERIFY: dict[str, Any] = {
    "base": "sha256:" + "7" * 64,
    "result": "sha256:" + "3" * 64,
    "merged": "",
    "targets": 36,
    "files": [{"file": "model.fp32.onnx", "nbytes": 9, "sha256": "sha256:" + "a" * 64}],
    "passed": True,
    "failure": None,
    "results": [RAN, SILENT],
    "agreement": [
        {
            "output": "logits",
            "rows": 725,
            "merged": {"top1": 0.86, "cosine": 0.96, "kl": 0.11},
            "base": {"top1": 0.48, "cosine": 0.68, "kl": "inf"},
        }
    ],
}
DEMO = {
    "folder": "kilodelta-demo",
    "steps": [
        {"name": "merge", "command": "kilodelta merge base task.kd", "said": "ok", "seconds": 0.1}
    ],
    "summary": [
        {"name": "base", "nbytes": 90_900_000, "accuracy": 0.423},
        {"name": "delta", "nbytes": 11984, "accuracy": 0.739},
    ],
    "verification": VERIFY,
}
PORT = {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}
EXPORT = {
    "tool": "kilodelta",
    "base": {"name": "mini", "root": "sha256:" + "7" * 64},
    "result": {"root": "sha256:" + "3" * 64},
    "artefacts": [
        {
            "kind": "onnx",
            "dtype": "float32",
            "files": [{"file": "model.fp32.onnx", "nbytes": 9, "sha256": "sha256:" + "a" * 64}],
            "inputs": [PORT],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 7]}],
        }
    ],
}
FLEET = {
    "out": "out",
    "counts": {"failed": 1, "not begun": 0, "open": 0, "done": 1},
    "rows": [
        {
            "fine_tune": "intents",
            "target": "onnx16",
            "status": status,
            "why": why,
            "agreement": agreement,
            "nbytes": 11984,
            "seconds": 1.5,
            "place": "fine-tunes/intents/onnx16",
        }
        for status, why, agreement in (("failed", "no room", None), ("done", "", 0.981))
    ],
}
RESULTS = {"fleet": FLEET, "compress": COMPRESS, "verify": VERIFY, "demo": DEMO, "export": EXPORT}


class Texts(HTMLParser):
    """What a page shows, and what it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.fetched: list[str] = []
        self.scripts = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.fetched += [
            str(value)
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and not str(value).startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize("kind", RESULTS)
def test_a_page_fetches_nothing_and_shows_its_numbers(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "report.html"
    assert write_report(place, kind, RESULTS[kind]) == tmp_path / "report.json"
    page = place.read_text()
    seen = Texts(page)
    assert seen.fetched == []
    assert seen.scripts == 1
    assert "url(" not in page.replace("url(#", "")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == {"commands": [], **RESULTS[kind]}
    whole = " ".join(seen.texts)
    wanted = {
        "compress": ["0.9670", "0.4680", "classifier.weight", "12 KB", "kilodelta compress base"],
        "verify": ["7.6e-07", "3e-06", "no NVIDIA driver", "0.86", "a" * 64],
        "demo": ["kilodelta merge base task.kd", "0.1"],
        "fleet": ["intents", "0.9810", "no room", "1 failed, 1 done"],
        "export": ["input_ids", "batch x sequence", "a" * 64],
    }
    for text in wanted[kind]:
        assert text in whole, text
    assert re.search(r'<svg role="img" aria-label="[^"]{20,}"', page) or kind in (
        "verify",
        "export",
        "fleet",
    )


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(tmp_path / f"{name}.html", "compress", COMPRESS)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_half_a_surrogate_pair_is_shown_as_it_was_spelt(tmp_path: Path) -> None:
    odd = {**COMPRESS, "method": {"name": "no\ud800la"}}
    write_report(tmp_path / "x.html", "compress", odd)
    assert json.loads((tmp_path / "x.json").read_text())["method"]["name"] == "no\ud800la"


def test_numbers_that_json_lacks_become_texts(tmp_path: Path) -> None:
    odd = {**COMPRESS, "before": {"agreement": 0.5, "divergence": math.inf}}
    odd["layers"] = [*LAYERS, {"name": "x.weight", "relative_norm": math.nan, "explained": -1.5}]
    write_report(tmp_path / "x.html", "compress", odd)
    assert json.loads((tmp_path / "x.json").read_text())["before"]["divergence"] == "inf"
    assert "nan" in (tmp_path / "x.json").read_text()


def test_the_running_command_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {name: value for name, value in COMPRESS.items() if name != "commands"}
    monkeypatch.setattr("sys.argv", ["/usr/bin/kilodelta", "compress", "a b", "c"])
    write_report(tmp_path / "x.html", "compress", given)
    assert "kilodelta compress &#x27;a b&#x27; c" in (tmp_path / "x.html").read_text()
    monkeypatch.setattr("sys.argv", ["/usr/bin/other", "secret"])
    write_report(tmp_path / "x.html", "compress", given)
    assert "secret" not in (tmp_path / "x.html").read_text()


def test_texts_of_a_result_stay_texts(tmp_path: Path) -> None:
    """Names come from files of strangers: none of them may become markup, in pictures either."""
    layers = [{**LAYERS[0], "name": f"encoder.layer.0.{HOSTILE}.weight"}, LAYERS[3]]
    hostile = {**COMPRESS, "path": HOSTILE, "extras": [HOSTILE], "layers": layers}
    hostile["commands"] = [HOSTILE]
    hostile["sizes"] = [{**s, "name": HOSTILE} for s in COMPRESS["sizes"]]
    write_report(tmp_path / "x.html", "compress", hostile)
    page = (tmp_path / "x.html").read_text()
    assert Texts(page).scripts == 1
    assert "alert(1)</script>" not in page


def test_pictures_are_wellformed_and_take_the_pages_colours() -> None:
    series = [plots.Series(name="a", x=[1, 10, 100], y=[0.1, 0.5, 0.9])]
    svg = plots.lines(series, x="bytes", y="agreement", alt="rises", logarithmic=True)
    root = ET.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == "rises"
    assert "viewBox" in root.attrib
    assert "width" not in root.attrib
    assert "var(--ink)" in svg
    assert not re.search("|".join(plots.VARIABLES), svg)


def test_tensors_stand_by_layer_and_place() -> None:
    rows, columns, cells = plots.grid(
        {"h.10.a.weight": 1.0, "h.2.a.weight": 2.0, "h.2.b.weight": 3.0, "head.weight": 4.0}
    )
    assert columns == ["2", "10", "-"]
    assert rows == ["a", "b", "head"]
    assert cells == [[2.0, 1.0, None], [3.0, None, None], [None, None, 4.0]]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (950, "950 B"),
        (11984, "12 KB"),
        (90_900_000, "90.9 MB"),
        (999_900_000, "1 GB"),
        (7e12, "7e+03 GB"),
    ],
)
def test_bytes_are_shown_in_powers_of_a_thousand(nbytes: float, text: str) -> None:
    assert byte_label(nbytes) == text


@pytest.mark.parametrize(
    ("before", "after", "level", "words"),
    [
        (0.5, 0.98, "green", "keeps 96 %"),
        (0.5, 0.85, "amber", "keeps only 70 %"),
        (0.5, 0.6, "red", "keeps only 20 %"),
        (0.8, 0.3, "red", "worse than the base"),
        (1.0, 1.0, "amber", "already agrees"),
    ],
)
def test_the_verdict_follows_the_share_of_the_gain(
    before: float, after: float, level: str, words: str
) -> None:
    judged = verdict_of({"before": {"agreement": before}, "after": {"agreement": after}})
    assert judged.level == level
    assert words in judged.text
    assert (judged.advice == "") == (level == "green")


@pytest.mark.parametrize(
    ("error", "words"), [(4.375, "raise --budget"), (51.04, "lower --lr"), (None, "raise --budget")]
)
def test_an_update_far_beyond_the_change_is_not_short_of_bytes(
    error: float | None, words: str
) -> None:
    poor = {"before": {"agreement": 0.24}, "after": {"agreement": 0.36}, "weight_error": error}
    assert words in verdict_of(poor).advice
    good = {"before": {"agreement": 0.24}, "after": {"agreement": 0.99}, "weight_error": error}
    assert verdict_of(good).advice == ""


def test_the_share_is_of_the_way_from_base_to_tuned() -> None:
    assert kept_share(0.4, 0.7, 0.8) == pytest.approx(0.75)
    assert kept_share(0.4, 0.4, 0.4) is None


def test_verdicts_of_other_results() -> None:
    assert verdict_of({"after": None, "before": None}).level == "amber"
    assert verdict_of({**COMPRESS, "interrupted": True}).advice.endswith("--resume")
    assert verdict_of(VERIFY).text.startswith("1 of 2 runs")
    assert "1 could not run" in verdict_of(VERIFY).advice
    assert verdict_of({"passed": True}).text == "every digest is as promised"
    failed = verdict_of({"passed": False, "failure": "logits are off", "fix": "export again"})
    assert (failed.level, failed.text, failed.advice) == ("red", "logits are off", "export again")


def test_odd_requests_are_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no HTML file"):
        write_report(tmp_path / "x.txt", "compress", COMPRESS)
    with pytest.raises(InputError, match="no report of 'merge'"):
        write_report(tmp_path / "x.html", "merge", COMPRESS)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="matplotlib"):
        write_report(tmp_path / "x.html", "compress", COMPRESS)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def browser() -> Any:
    """A real headless Chromium; the system's own, because tests download nothing."""
    sync_api = pytest.importorskip("playwright.sync_api")
    place = shutil.which("chromium") or shutil.which("chromium-browser")
    if place is None:
        pytest.skip("no Chromium on this machine")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=place, args=arguments)
        yield opened
        opened.close()


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1100, "light")])
def test_a_browser_opens_it_without_a_word(
    browser: Any, kind: str, width: int, scheme: str, tmp_path: Path
) -> None:
    place = tmp_path / "report.html"
    write_report(place, kind, RESULTS[kind])
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    words: list[str] = []
    page.on("console", lambda message: words.append(message.text))
    page.on("pageerror", lambda error: words.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(place.as_uri())
    assert words == []
    assert asked == [place.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")
    context.close()


def test_a_click_on_a_heading_sorts(browser: Any, tmp_path: Path) -> None:
    columns = [Column(title="name"), Column(title="bytes", number=True)]
    rows = [(Cell(text=str(n)), Cell(text=f"{n:,}", value=n)) for n in (1000, 20, 300)]
    body = table(columns, rows, sortable=True)
    place = tmp_path / "page.html"
    place.write_text(Page(title="t", sections=[Section(title="s", body=body)]).html())
    page = browser.new_page()
    page.goto(place.as_uri())
    page.get_by_role("button", name="bytes").click()
    first = "[...document.querySelectorAll('tbody tr')].map(r => r.cells[0].textContent).join()"
    assert page.evaluate(first) == "20,300,1000"
    page.get_by_role("button", name="bytes").click()
    assert page.evaluate(first) == "1000,300,20"
    page.close()
