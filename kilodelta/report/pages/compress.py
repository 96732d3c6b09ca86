"""Lay out what `kilodelta compress` kept: fidelity against size, training, and each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kilodelta.report import plots
from kilodelta.report.html import Cell, Column, Page, Section, figure, paragraph, table
from kilodelta.report.pages.parts import Json, again, facts_table, legend, number_cell
from kilodelta.report.plots import Series
from kilodelta.report.verdict import verdict_of
from kilodelta.sizes import byte_label

ALIKE = (
    "The LoRA starts from the SVD of the change and is trained on the same inputs, steps, batch and"
    " bits, at LoRA's own learning rate. Where the bytes do not buy rank 1 of every tensor, it"
    " changes the tensors with the largest change for their bytes."
)
"""What is equal between a file and the LoRA beside it."""


def compress_page(result: Json) -> Page:
    """Lay out the result of `kilodelta compress`."""
    sections = [
        _kept(result),
        _curve(result.get("sizes"), result.get("before")),
        _training(result.get("curve")),
        _layers(result.get("layers")),
        _compress_facts(result),
        again(result),
        legend(["agreement", "divergence", "relative norm", "explained"]),
    ]
    return Page(
        title=f"{Path(str(result['path'])).name}: what was kept",
        subtitle=f"{byte_label(result['nbytes']['file'])} in place of "
        f"{byte_label(result['tuned_bytes'])}",
        verdict=verdict_of(result),
        sections=[s for s in sections if s is not None],
    )


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
            number_cell(m["agreement"], ".4f"),
            number_cell(m["divergence"], ".4g"),
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
    """Draw held-out agreement over the steps; `curve` holds `step` and `agreement` of each look."""
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
    """Draw size against fidelity; `sizes` holds `name`, `nbytes`, `agreement` of each file.

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
        Column(title="how"),
        Column(title="bytes", number=True),
        Column(title="agreement", number=True),
    ]
    rows = [
        (
            Cell(text=str(s["name"])),
            Cell(text=str(s.get("how", ""))),
            Cell(text=f"{s['nbytes']:,}", value=s["nbytes"]),
            number_cell(s["agreement"], ".4f"),
        )
        for s in sizes
    ]
    body = figure(svg, "Bytes against what they keep.") + table(columns, rows, sortable=True)
    if any(name.startswith("LoRA") for name in names):
        body += paragraph(ALIKE, faint=True)
    return Section(title="Size against fidelity", body=body)


def _layers(layers: Sequence[Json] | None) -> Section | None:
    """Draw each target's update; `layers` holds `name`, `relative_norm`, perhaps `explained`."""
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


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _compress_facts(result: Json) -> Section:
    method = ", ".join(f"{k} {v}" if k != "name" else str(v) for k, v in result["method"].items())
    facts = [
        ("method", f"{method}, {result['bits']}-bit coefficients"),
        ("tensors updated", str(result["targets"])),
        ("stored whole", ", ".join(result["extras"]) or "none"),
        (
            "not carried",
            f"{_tensors(len(result['dropped']))}, {100 * result['dropped_energy']:.2g} % of the"
            " squared change"
            if result["dropped"]
            else "nothing",
        ),
        ("steps", f"{result['steps']} in {result['seconds']:.0f} s"),
        ("digest of the result", str(result["result"])),
    ]
    return Section(title="The file", body=facts_table(facts))
