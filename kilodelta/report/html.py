"""The frame of a report: one HTML file with its style inside, and nothing fetched.

Colours are CSS variables with a dark and a light value, so pictures follow the reader's system;
wide tables and pictures scroll in their own box, so a phone shows the page without zooming out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from kilodelta.report.verdict import WORDS, Verdict

LIGHT = """--paper: #fcfcfb; --ink: #1c1c1e; --faint: #6b6b70;
  --line: #dedee2; --box: #f2f2f4; --c1: #2458b8; --c2: #b4541a; --c3: #2c7a4b; --c4: #7a4a9e;
  --green: #1f7a43; --amber: #96620a; --red: #b3261e;"""
"""The colours of pages and pictures by name, as CSS."""
DARK = """--paper: #16171a; --ink: #e8e8ea; --faint: #a0a1a8;
  --line: #34363c; --box: #202228; --c1: #7fa8f5; --c2: #eb9a63; --c3: #6fc48f; --c4: #c096e0;
  --green: #6fc48f; --amber: #e0b050; --red: #f08a80;"""
"""The same for who prefers dark pages."""
COLOURS = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
"""
STYLE = (
    COLOURS
    + """* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 56rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
p { margin: .4rem 0; } .faint, figcaption { color: var(--faint); font-size: .9rem; }
.verdict { border-left: .35rem solid; border-radius: .3rem; padding: .7rem .9rem; margin: 1rem 0;
  background: var(--box); } .verdict b { display: block; }
.green { border-color: var(--green); } .amber { border-color: var(--amber); }
.red { border-color: var(--red); }
.status-passed { color: var(--green); } .status-failed { color: var(--red); font-weight: 600; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; padding-bottom: .2rem; }
th { text-align: left; font-weight: 600; color: var(--faint); }
th, td { padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; } td.number, th.number { text-align: right; padding-left: .8rem;
  font-variant-numeric: tabular-nums; white-space: nowrap; } th.number { white-space: normal; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--c1); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
code, pre { font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
td code { overflow-wrap: anywhere; } td:has(> code) { min-width: 9rem; }
pre { background: var(--box); padding: .7rem .9rem; border-radius: .3rem; overflow-x: auto; }
figure { margin: .8rem 0; } figure svg { width: 100%; height: auto; display: block; }
figure.small { max-width: 38rem; } figure.small svg { min-width: 27rem; }
figure.map svg { min-width: 34rem; }
"""
)

SORT = """
for (const head of document.querySelectorAll("th[data-sort]")) {
  const button = document.createElement("button"); button.textContent = head.textContent;
  head.replaceChildren(button);
  button.addEventListener("click", () => {
    const table = head.closest("table"), rows = [...table.tBodies[0].rows];
    const up = head.getAttribute("aria-sort") !== "ascending", at = head.cellIndex;
    const key = row => row.cells[at].dataset.value ?? row.cells[at].textContent;
    const number = head.dataset.sort === "number";
    const compare = (a, b) => number ? key(a) - key(b) : key(a).localeCompare(key(b));
    rows.sort((a, b) => up ? compare(a, b) : compare(b, a));
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    table.tBodies[0].append(...rows);
  });
}
"""


@dataclass(frozen=True, kw_only=True)
class Column:
    """A table's column: its heading, and whether its cells are numbers (aligned to the right)."""

    title: str
    number: bool = False


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell's text, the number it is sorted by where that is not its text, and its CSS class."""

    text: str
    value: float | None = None
    kind: str = ""
    code: bool = False
    link: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A headed part of a page; `body` is HTML, made by the functions of this module only."""

    title: str
    body: str


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report: title, a line below it, a verdict, and sections in reading order."""

    title: str
    subtitle: str = ""
    verdict: Verdict | None = None
    sections: Sequence[Section] = field(default_factory=tuple)

    def html(self) -> str:
        """Return the page as one self-contained HTML document."""
        judged = "" if self.verdict is None else verdict(self.verdict)
        parts = "".join(
            f"<section><h2>{escape(s.title)}</h2>{s.body}</section>" for s in self.sections
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{STYLE}</style></head>"
            f"<body><header><h1>{escape(self.title)}</h1>"
            f'<p class="faint">{escape(self.subtitle)}</p></header>'
            f"<main>{judged}{parts}</main><script>{SORT}</script></body></html>\n"
        )


def verdict(judged: Verdict) -> str:
    """Return a coloured box; the colour is said in words for who cannot see it."""
    words = WORDS[judged.level].capitalize()
    advice = f"<p>{escape(judged.advice)}</p>" if judged.advice else ""
    text = f"<b>{words}</b>{escape(judged.text)}{advice}"
    return f'<div class="verdict {judged.level}" role="status">{text}</div>'


def paragraph(text: str, *, faint: bool = False) -> str:
    """Return escaped text as a paragraph."""
    return f'<p class="faint">{escape(text)}</p>' if faint else f"<p>{escape(text)}</p>"


def commands(lines: Iterable[str]) -> str:
    """Return shell commands as one block to copy."""
    return f"<pre><code>{escape(chr(10).join(lines))}</code></pre>"


def figure(svg: str, caption: str, *, kind: str = "small") -> str:
    """Return a picture with its caption; `svg` comes from `plots.py` alone."""
    inner = f'{svg}<figcaption class="faint">{escape(caption)}</figcaption>'
    return f'<figure class="{kind}"><div class="wide">{inner}</div></figure>'


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[Cell]],
    *,
    caption: str = "",
    sortable: bool = False,
) -> str:
    """Return a table in a box that scrolls sideways.

    Args:
        columns: one for each cell of a row.
        rows: the cells, escaped here.
        caption: what the table shows, read aloud first by screen readers.
        sortable: let a click on a heading sort the rows.
    """
    heads = "".join(_head(column, sortable) for column in columns)
    body = "".join(
        "<tr>" + "".join(_cell(c, column) for c, column in zip(row, columns, strict=True)) + "</tr>"
        for row in rows
    )
    told = f'<caption class="faint">{escape(caption)}</caption>' if caption else ""
    inner = f"<table>{told}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{inner}</div>'


def _head(column: Column, sortable: bool) -> str:
    kind = ' class="number"' if column.number else ""
    sort = f' data-sort="{"number" if column.number else "text"}"' if sortable else ""
    return f'<th scope="col"{kind}{sort}>{escape(column.title)}</th>'


def _cell(cell: Cell, column: Column) -> str:
    classes = " ".join(filter(None, ["number" if column.number else "", cell.kind]))
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    text = escape(cell.text)
    if cell.link:
        text = f'<a href="{escape(cell.link, quote=True)}">{text}</a>'
    if cell.code:
        text = f"<code>{text}</code>"
    return f"<td{f' class={chr(34)}{classes}{chr(34)}' if classes else ''}{value}>{text}</td>"
