"""Turn what a command prints with `--json` into a page: one function for each command."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError, OutputError, require
from kilodelta.report import plots
from kilodelta.report.html import Cell, Column, Page, Section, commands, figure, paragraph, table
from kilodelta.report.plots import Series, byte_label
from kilodelta.report.verdict import AMBER, GREEN, RED, Level, Verdict, verdict_of

Json = Mapping[str, Any]

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


def write_report(path: str | os.PathLike[str], kind: str, result: Json) -> Path:
    """Write a result as an HTML page, and as JSON beside it.

    Args:
        path: the page; its JSON takes the same name with the suffix `.json`.
        kind: the command that made the result: `compress`, `verify`, `export`, `demo` or `fleet`.
        result: what that command prints with `--json`. `commands` in it, a list of shell lines,
            are shown as the way to make it again; by default the command that is running.

    Returns:
        The path of the JSON.

    Raises:
        InputError: the path does not end in `.html`, or there is no page for this kind.
        MissingPackageError: matplotlib is not installed.
        OutputError: the files cannot be written.
    """
    from kilodelta.files import staging

    place = Path(path)
    require_page(place)
    if kind not in PAGES:
        raise InputError(f"there is no report of {kind!r}", fix=f"one of {', '.join(PAGES)}")
    result = _strict({"commands": running_command(), **result})
    text = PAGES[kind](result).html()
    data = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    staging.write(place, text.encode("utf-8"))
    staging.write(place.with_suffix(".json"), data.encode("utf-8"))
    return place.with_suffix(".json")


def require_page(path: Path) -> None:
    """See that a page can be written, before the work whose result it shows.

    Raises:
        InputError: the name does not end in `.html`.
        OutputError: its folder is missing.
        MissingPackageError: matplotlib is not installed.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{path} is no HTML file", fix="give a name that ends in .html")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path} lies in no folder", fix="make the folder first")
    require("matplotlib", extra="report", why="draw the report's pictures")


def running_command() -> list[str]:
    """Return the command line that is running, if it is kilodelta's own."""
    program = Path(sys.argv[0] if sys.argv else "")
    if program.name != "kilodelta" and program.parts[-2:] != ("kilodelta", "__main__.py"):
        return []
    return [shlex.join(["kilodelta", *sys.argv[1:]])]


def _strict(value: Any) -> Any:
    """Turn numbers that strict JSON lacks into texts, tuples into lists, paths into texts."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def compress_page(result: Json) -> Page:
    """Lay out the result of `kilodelta compress`."""
    sections = [
        _kept(result),
        _curve(result.get("sizes"), result.get("before")),
        _training(result.get("curve")),
        _layers(result.get("layers")),
        _compress_facts(result),
        _again(result),
        _legend(["agreement", "divergence", "relative norm", "explained"]),
    ]
    return Page(
        title=f"{Path(str(result['path'])).name}: what was kept",
        subtitle=f"{byte_label(result['nbytes']['file'])} in place of "
        f"{byte_label(result['tuned_bytes'])}",
        verdict=verdict_of(result),
        sections=[s for s in sections if s is not None],
    )


def verify_page(result: Json) -> Page:
    """Lay out the result of `kilodelta verify`."""
    sections = [
        _parity(result.get("results")),
        _silent(result.get("results")),
        _agreement(result.get("agreement")),
        _digests(result),
        _again(result),
        _legend(["error", "update", "agreement", "divergence"]),
    ]
    return Page(
        title="Verification",
        subtitle=f"base {str(result.get('base', ''))[:23]}…",
        verdict=verdict_of(result),
        sections=[s for s in sections if s is not None],
    )


def export_page(result: Json) -> Page:
    """Lay out the result of `kilodelta export`: its manifest."""
    rows = [
        (
            Cell(text=str(a["kind"])),
            Cell(text=str(a["dtype"])),
            Cell(text=file["file"], code=True),
            Cell(text=byte_label(file["nbytes"]), value=file["nbytes"]),
            Cell(text=file["sha256"], code=True),
        )
        for a in result["artefacts"]
        for file in a["files"]
    ]
    columns = [
        Column(title="kind"),
        Column(title="precision"),
        Column(title="file"),
        Column(title="bytes", number=True),
        Column(title="SHA-256"),
    ]
    ports = [
        (
            Cell(text=port["name"], code=True),
            Cell(text=direction),
            Cell(text=str(port["dtype"])),
            Cell(text=" x ".join(map(str, port["shape"]))),
        )
        for a in result["artefacts"][:1]
        for direction, key in (("input", "inputs"), ("output", "outputs"))
        for port in a[key]
    ]
    heads = [Column(title=t) for t in ("tensor", "direction", "type", "shape")]
    sections = [
        Section(title="Files", body=table(columns, rows, sortable=True)),
        Section(title="Inputs and outputs", body=table(heads, ports)),
        _digests({"base": result["base"]["root"], "result": result["result"]["root"]}),
        _again(result),
    ]
    return Page(
        title=f"Export of {result['base']['name'] or 'a model'}",
        subtitle=f"made by {result['tool']}",
        sections=[s for s in sections if s is not None],
    )


def demo_page(result: Json) -> Page:
    """Lay out the result of `kilodelta demo`."""
    rows = result["summary"]
    accuracy = plots.bars(
        [f"{r['name']} ({byte_label(r['nbytes'])})" for r in rows],
        [100 * r["accuracy"] for r in rows],
        x="test accuracy in %",
        alt="Test accuracy: " + ", ".join(f"{r['name']} {100 * r['accuracy']:.1f} %" for r in rows),
    )
    steps = [
        (
            Cell(text=s["name"]),
            Cell(text=s["said"]),
            Cell(text=f"{s['seconds']:.1f}", value=s["seconds"]),
        )
        for s in result["steps"]
    ]
    columns = [Column(title="step"), Column(title="what came out"), Column(title="s", number=True)]
    lines = [s["command"] for s in result["steps"] if s["command"]]
    proof = verify_page(result["verification"])
    return Page(
        title="kilodelta demo",
        subtitle=str(result["folder"]),
        verdict=proof.verdict,
        sections=[
            Section(title="Right answers", body=figure(accuracy, "Right answers on test texts.")),
            Section(title="Steps", body=table(columns, steps)),
            *[s for s in proof.sections if s.title != "Run it again"],
            Section(title="Run it again", body=commands(lines)),
        ],
    )


def fleet_page(result: Json) -> Page:
    """Lay out the result of `kilodelta fleet status`: fine-tunes by target, the worst first."""
    counts = ", ".join(f"{n} {name}" for name, n in result["counts"].items() if n)
    bad = result["counts"].get("failed", 0) + result["counts"].get("not begun", 0)
    left = result["counts"].get("open", 0)
    level: Level = RED if bad else AMBER if left else GREEN
    advice = "mend what is named below and run the fleet again" if bad else ""
    rows = [
        (
            Cell(text=row["fine_tune"]),
            Cell(text=row["target"]),
            _status("passed" if row["status"] == "done" else row["status"]),
            Cell(
                text="" if row["agreement"] is None else f"{row['agreement']:.4f}",
                value=-1.0 if row["agreement"] is None else row["agreement"],
            ),
            Cell(text=byte_label(row["nbytes"]) if row["nbytes"] else "", value=row["nbytes"]),
            Cell(
                text="" if row["seconds"] is None else f"{row['seconds']:.1f}",
                value=row["seconds"] or 0.0,
            ),
            Cell(text=row["place"], code=True),
            Cell(text=row["why"]),
        )
        for row in result["rows"]
    ]
    columns = [
        Column(title="fine-tune"),
        Column(title="target"),
        Column(title="status"),
        Column(title="agreement", number=True),
        Column(title="bytes", number=True),
        Column(title="s", number=True),
        Column(title="place"),
        Column(title="why"),
    ]
    body = table(columns, rows, sortable=True)
    return Page(
        title="Fleet",
        subtitle=str(result["out"]),
        verdict=Verdict(level=level, text=counts or "nothing to do", advice=advice),
        sections=[Section(title="Fine-tunes by target", body=body), _legend(["agreement"])],
    )


PAGES: Mapping[str, Callable[[Json], Page]] = {
    "compress": compress_page,
    "verify": verify_page,
    "export": export_page,
    "demo": demo_page,
    "fleet": fleet_page,
}


def _kept(result: Json) -> Section | None:
    before, after = result.get("before"), result.get("after")
    if before is None or after is None:
        return None
    kind = f"agreement ({result['kind']})"
    rows = [("base", before), ("base + this file", after)]
    for one in result.get("outputs", ()) if len(result.get("outputs", ())) > 1 else ():
        rows += [
            (f"{one['name']} ({one['counts']}): base", one["before"]),
            (f"{one['name']} ({one['counts']}): base + this file", one["after"]),
        ]
    cells = [
        (
            Cell(text=name),
            _number(m["agreement"], ".4f"),
            _number(m["divergence"], ".4g"),
        )
        for name, m in rows
    ]
    columns = [
        Column(title="model"),
        Column(title=kind, number=True),
        Column(title="divergence", number=True),
    ]
    caption = f"against the tuned model, on {result['held_out']} held-out inputs"
    warned = "".join(paragraph(text) for text in result.get("warnings", ()))
    body = table(columns, cells, caption=caption) + warned
    return Section(title="What was kept", body=body)


def _training(curve: Sequence[Json] | None) -> Section | None:
    """Held-out agreement over the steps; `curve` holds `step` and `agreement` of each look."""
    if not curve or len(curve) < 2:
        return None
    points = [(float(p["step"]), float(p["agreement"])) for p in curve]
    best = max(points, key=lambda p: p[1])
    svg = plots.lines(
        [Series(name="held-out agreement", x=[p[0] for p in points], y=[p[1] for p in points])],
        x="step",
        y="agreement with the tuned model",
        alt=f"Agreement rises from {points[0][1]:.3f} at step {points[0][0]:.0f} to "
        f"{best[1]:.3f} at step {best[0]:.0f}",
    )
    text = f"Agreement on held-out inputs while training; best {best[1]:.4f} at step {best[0]:.0f}."
    return Section(title="Training", body=figure(svg, text))


def _curve(sizes: Sequence[Json] | None, base: Json | None = None) -> Section | None:
    """Size against fidelity; `sizes` holds `name`, `nbytes`, `agreement` of each file.

    `base` is what the base alone reaches.
    """
    if not sizes:
        return None
    names = list(dict.fromkeys(str(s["name"]) for s in sizes))
    series = [
        Series(
            name=name,
            x=[float(s["nbytes"]) for s in sizes if s["name"] == name],
            y=[float(s["agreement"]) for s in sizes if s["name"] == name],
            reference=index > 0,
        )
        for index, name in enumerate(names)
    ]
    largest = max(sizes, key=lambda s: s["nbytes"])
    svg = plots.lines(
        series,
        x="bytes of the file",
        y="agreement with the tuned model",
        alt=f"Size against agreement for {', '.join(names)}; the largest file, "
        f"{byte_label(largest['nbytes'])}, reaches {largest['agreement']:.3f}",
        logarithmic=True,
        levels={"the base alone": float(base["agreement"])} if base else {},
    )
    columns = [
        Column(title="way"),
        Column(title="bytes", number=True),
        Column(title="agreement", number=True),
    ]
    rows = [
        (
            Cell(text=str(s["name"])),
            Cell(text=f"{s['nbytes']:,}", value=s["nbytes"]),
            _number(s["agreement"], ".4f"),
        )
        for s in sizes
    ]
    body = figure(svg, "Bytes against what they keep.") + table(columns, rows, sortable=True)
    return Section(title="Size against fidelity", body=body)


def _layers(layers: Sequence[Json] | None) -> Section | None:
    """`layers` holds `name`, `relative_norm` and, where it is known, `explained` of each target."""
    if not layers:
        return None
    norms = _finite(layers, "relative_norm")
    if not norms:
        return None
    most = max(norms, key=lambda name: norms[name])
    body = figure(
        plots.layer_map(
            norms,
            alt=f"Update of each layer; the largest, {norms[most]:.3g}, is that of {most}",
        ),
        "Norm of each update over the norm of the base's tensor.",
        kind="map",
    )
    explained = _finite(layers, "explained")
    if explained:
        body += figure(
            plots.layer_map(
                explained,
                alt="Share of the fine-tune's own change that each layer's update carries",
            ),
            "Share of the fine-tune's own change of each tensor that the update carries.",
            kind="map",
        )
    return Section(title="Update of each layer", body=body)


def _finite(layers: Sequence[Json], key: str) -> dict[str, float]:
    values = {str(t["name"]): t.get(key) for t in layers}
    return {n: float(v) for n, v in values.items() if isinstance(v, (int, float))}


def _compress_facts(result: Json) -> Section:
    method = ", ".join(f"{k} {v}" if k != "name" else str(v) for k, v in result["method"].items())
    facts = [
        ("method", f"{method}, {result['bits']}-bit coefficients"),
        ("tensors updated", str(result["targets"])),
        ("stored whole", ", ".join(result["extras"]) or "none"),
        (
            "not carried",
            f"{len(result['dropped'])} tensors, {100 * result['dropped_energy']:.2g} % of the"
            " squared change"
            if result["dropped"]
            else "nothing",
        ),
        ("steps", f"{result['steps']} in {result['seconds']:.0f} s"),
        ("digest of the result", str(result["result"])),
    ]
    return Section(title="The file", body=_facts(facts))


def _parity(results: Sequence[Json] | None) -> Section | None:
    ran = [r for r in results or () if r["checks"]]
    if not ran:
        return None
    rows = []
    for r in ran:
        for check in r["checks"]:
            error, most = check["error"]["relative_l2"], check["limit"]["relative_l2"]
            share = r["update"].get(check["output"])
            rows.append(
                (
                    Cell(text=r["artefact"], code=True),
                    Cell(text=f"{r['runner']}, {r['precision']}"),
                    Cell(text=check["output"], code=True),
                    Cell(text=f"{check['case']} {'x'.join(map(str, check['shape']))}"),
                    _number(error),
                    _number(most),
                    Cell(text="" if share is None else f"{float(share):.4f}"),
                    _status("passed" if check["passed"] else "failed"),
                )
            )
    columns = [
        Column(title="artefact"),
        Column(title="runner"),
        Column(title="output"),
        Column(title="shape"),
        Column(title="error", number=True),
        Column(title="at most", number=True),
        Column(title="update", number=True),
        Column(title="result"),
    ]
    departures = "".join(
        paragraph(
            f"{r['artefact']} in {r['runner']}: first off at {r['departure']['layer']}"
            f" ({r['departure']['operator']} {r['departure']['node']})"
        )
        for r in ran
        if r.get("departure")
    )
    body = table(columns, rows, sortable=True) + departures
    return Section(title="Parity with the merged model in float64", body=body)


def _silent(results: Sequence[Json] | None) -> Section | None:
    silent = [r for r in results or () if not r["checks"]]
    if not silent:
        return None
    rows = [
        (
            Cell(text=r["artefact"], code=True),
            Cell(text=r["runner"]),
            _status(r["status"]),
            Cell(text="; ".join(r["reasons"])),
        )
        for r in silent
    ]
    columns = [Column(title=t) for t in ("artefact", "runner", "status", "why")]
    return Section(title="Without outputs", body=table(columns, rows))


def _agreement(rows: Sequence[Json] | None) -> Section | None:
    if not rows:
        return None
    cells = [
        (
            Cell(text=r["output"], code=True),
            Cell(text=name),
            _number(r[name]["top1"]),
            _number(r[name]["cosine"]),
            _number(r[name]["kl"]),
        )
        for r in rows
        for name in ("merged", "base")
    ]
    columns = [
        Column(title="output"),
        Column(title="model"),
        Column(title="top-1", number=True),
        Column(title="cosine", number=True),
        Column(title="KL", number=True),
    ]
    caption = f"over {rows[0]['rows']} inputs"
    body = table(columns, cells, caption=caption)
    return Section(title="Agreement with the tuned model", body=body)


def _digests(result: Json) -> Section | None:
    names = {"base": "base", "result": "targets of the result", "merged": "merged model"}
    facts = [(text, str(result[key])) for key, text in names.items() if result.get(key)]
    files = result.get("files") or ()
    facts += [(f["file"], f["sha256"]) for f in files]
    return Section(title="Digests", body=_facts(facts)) if facts else None


def _again(result: Json) -> Section | None:
    lines = result.get("commands")
    return Section(title="Run it again", body=commands(lines)) if lines else None


def _legend(words: Sequence[str]) -> Section:
    return Section(title="Words", body=_facts([(word, LEGEND[word]) for word in words], code=False))


def _facts(facts: Sequence[tuple[str, str]], *, code: bool = True) -> str:
    rows = [(Cell(text=name), Cell(text=text, code=code and ":" in text)) for name, text in facts]
    return table([Column(title="what"), Column(title="value")], rows)


def _number(value: float | str | None, form: str = ".3g") -> Cell:
    """Show a number of strict JSON, whose infinities are texts; None is not defined here."""
    if value is None:
        return Cell(text="")
    number = float(value)
    return Cell(text=format(number, form), value=number)


def _status(status: str) -> Cell:
    return Cell(text=status, kind=f"status-{status.replace(' ', '-')}")
