"""Make the sections and cells that pages of several commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kilodelta.report.html import Cell, Column, Section, commands, table

Json = Mapping[str, Any]
"""What a command prints with `--json`, or a part of it."""

LEGEND = {
    "agreement": "how often the model makes the tuned model's choice on inputs that were held out"
    " (top-1), or how near its vectors are (cosine); 1 is the tuned model itself",
    "divergence": "KL divergence from the tuned model's probabilities in nats (for vectors,"
    " 1 - cosine); 0 is the tuned model itself",
    "relative norm": "norm of the update over the norm of the base's tensor",
    "explained": "share of the fine-tune's own change of the tensor that the update carries; low"
    " is no fault: a distilled delta reaches the same outputs by other weights",
    "update": "share of the fine-tune's effect on an output that an artefact shows: 1 is the"
    " merged model's output, 0 the base's",
    "error": "relative L2 distance to the merged model computed in float64; the limit is four"
    " times what plain torch shows in the same precision",
}
"""Every word that a page uses for a number, explained once."""


def digests(result: Json) -> Section | None:
    """List the digests of models and files that a result states; None if it states none."""
    names = {"base": "base", "result": "targets of the result", "merged": "merged model"}
    facts = [(text, str(result[key])) for key, text in names.items() if result.get(key)]
    files = result.get("files") or ()
    facts += [(f["file"], f["sha256"]) for f in files]
    return Section(title="Digests", body=facts_table(facts)) if facts else None


def again(result: Json) -> Section | None:
    """Show the shell lines that make the result again; None if it has no `commands`."""
    lines = result.get("commands")
    return Section(title="Run it again", body=commands(lines)) if lines else None


def legend(words: Sequence[str]) -> Section:
    """Explain words of `LEGEND`."""
    return Section(
        title="Words", body=facts_table([(word, LEGEND[word]) for word in words], code=False)
    )


def facts_table(facts: Sequence[tuple[str, str]], *, code: bool = True) -> str:
    """Return a table of names and values; with `code`, a value with a colon is set as code."""
    rows = [(Cell(text=name), Cell(text=text, code=code and ":" in text)) for name, text in facts]
    return table([Column(title="what"), Column(title="value")], rows)


def number_cell(value: float | str | None, form: str = ".3g") -> Cell:
    """Show a number of strict JSON, whose infinities are texts; None is not defined here."""
    if value is None:
        return Cell(text="")
    number = float(value)
    return Cell(text=format(number, form), value=number)


def status_cell(status: str) -> Cell:
    """Show a status in its colour."""
    return Cell(text=status, kind=f"status-{status.replace(' ', '-')}")
