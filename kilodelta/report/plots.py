"""Draw the pictures of a report with matplotlib, as inline SVG with equal bytes for equal data.

Colours are written as CSS variables, so that a picture follows the page into the dark; texts stay
texts, so that they can be found and read aloud; each picture has a role and a label.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

from kilodelta.errors import require
from kilodelta.sizes import byte_label

# Matplotlib wants real colours; these stand for the page's variables and are replaced in the SVG.
VARIABLES = {
    "#010203": "--ink",
    "#010204": "--faint",
    "#010205": "--line",
    "#0a0b01": "--c1",
    "#0a0b02": "--c2",
    "#0a0b03": "--c3",
    "#0a0b04": "--c4",
}
INK, FAINT, LINE, *SERIES = VARIABLES
MARKERS = "osD^"
"""A series differs from the next one by its marker as well as by its colour."""
_RC: Mapping[str, Any] = {
    "svg.hashsalt": "kilodelta",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "grid.color": LINE,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """A named line: x and y of equal length, drawn dashed where it is only for comparison."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    reference: bool = False


def lines(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    alt: str,
    logarithmic: bool = False,
    levels: Mapping[str, float] | None = None,
    ticks: Sequence[float] = (),
) -> str:
    """Draw lines over one axis and return the SVG.

    Args:
        series: what to draw, at most as many as there are colours (4).
        x: the horizontal axis in words, with its unit.
        y: the vertical axis in words, with its unit.
        alt: what the picture shows, for who cannot see it.
        logarithmic: whether x is.
        levels: horizontal lines by name (the tuned model, the base).
        ticks: values of a logarithmic x that are named; those of the series by default.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    with _figure(4.7, 3.0) as (fig, axes):
        for one, colour, marker in zip(series, SERIES, MARKERS, strict=False):
            axes.plot(
                one.x,
                one.y,
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.8,
                linestyle="--" if one.reference else "-",
                label=one.name,
            )
        for name, level in (levels or {}).items():
            axes.axhline(level, color=FAINT, linewidth=1, linestyle=":")
            axes.annotate(
                name,
                (1, level),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                color=FAINT,
                fontsize=9,
            )
        if logarithmic:
            axes.set_xscale("log")
            _byte_ticks(axes, ticks or [v for one in series for v in one.x])
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(axis="y", linewidth=0.6)
        if len(series) > 1:
            axes.legend(loc="best", fontsize=9)
        return _svg(fig, alt)


def bars(labels: Sequence[str], values: Sequence[float], *, x: str, alt: str) -> str:
    """Draw one horizontal bar for each label, its value written beside it; return the SVG.

    Args:
        labels: from top to bottom.
        values: one for each label.
        x: what the values are.
        alt: what the picture shows, for who cannot see it.
    """
    with _figure(4.7, 0.5 + 0.36 * len(labels) + 0.4) as (fig, axes):
        places = range(len(labels))
        axes.barh(places, values, color=SERIES[0], height=0.62)
        for place, value in zip(places, values, strict=True):
            axes.annotate(f" {value:.3g}", (value, place), va="center", color=INK, fontsize=9)
        axes.set_yticks(list(places), labels)
        axes.invert_yaxis()
        axes.set_xlabel(x)
        axes.margins(x=0.14)
        return _svg(fig, alt)


def layer_map(values: Mapping[str, float], *, alt: str) -> str:
    """Draw a heat map of one value for each tensor: a column for each layer, a row for each place.

    Args:
        values: by tensor name; the first number in a name is its layer.
        alt: what the picture shows, for who cannot see it.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    rows, columns, cells = grid(values)
    width, height = 1.9 + max(3.0, 0.44 * len(columns)), 1.1 + 0.3 * len(rows)
    top = max((v for row in cells for v in row if v is not None), default=1.0) or 1.0
    with _figure(min(width, 14), height) as (fig, axes):
        import matplotlib

        colours = matplotlib.colormaps["viridis"]
        for i, row in enumerate(cells):
            for j, value in enumerate(row):
                if value is None:
                    continue
                colour = colours(max(value, 0.0) / top)
                axes.add_patch(_square(j, i, colour))
                dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), colour, strict=False)) < 0.5
                axes.annotate(
                    _short(value),
                    (j, i),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="#ffffff" if dark else "#000000",
                )
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("layer", fontsize=9)
        return _svg(fig, alt)


def grid(
    values: Mapping[str, float],
) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Sort tensors into rows (their place in a layer) and columns (the layer), gaps as None.

    A tensor without a number in its name stands in a separate column, called `-`.
    """
    places: dict[str, dict[str, float]] = {}
    columns: list[str] = []
    for name, value in values.items():
        match = re.search(r"\.(\d+)\.", name)
        column = match.group(1) if match else "-"
        row = (name[match.end() :] if match else name).removesuffix(".weight")
        row = row if len(row) <= 40 else "…" + row[-39:]
        if column not in columns:
            columns.append(column)
        places.setdefault(row, {})[column] = value
    columns.sort(key=lambda c: (c == "-", int(c) if c != "-" else 0))
    rows = list(places)
    return rows, columns, [[places[r].get(c) for c in columns] for r in rows]


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes under the report's style, without pyplot's global state."""
    require("matplotlib", extra="report", why="draw the report's pictures")
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_RC}):
        fig = Figure(figsize=(width, height), layout="constrained")
        yield fig, fig.subplots()


def _svg(fig: Any, alt: str) -> str:
    """Return a figure as an SVG element for a page: no XML head, no date, named colours."""
    out = io.StringIO()
    fig.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    # A viewBox alone lets the page choose the width; matplotlib's points would overflow a phone.
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    label = escape(alt, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def _square(x: int, y: int, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, linewidth=0)


def _short(value: float) -> str:
    """Write a share in a cell's width: .05, -.05, 1.2."""
    return f"{value:.2f}".replace("0.", ".", 1) if 0 < abs(value) < 0.995 else f"{value:.2g}"


def apart(values: Sequence[float], least: float = 0.12) -> list[float]:
    """Return positive values in order, without those whose labels would touch a neighbour's.

    Args:
        values: places on a logarithmic axis; the smallest is kept.
        least: share of the axis between two that are kept.

    Example:
        >>> apart([12_000, 11_700, 22_000, 120_000])
        [11700, 22000, 120000]
    """
    found = sorted(set(values))
    if len(found) < 2:
        return found
    room = least * math.log(found[-1] / found[0])
    kept = found[:1]
    for value in found[1:]:
        if math.log(value / kept[-1]) >= room:
            kept.append(value)
    return kept


def _byte_ticks(axes: Any, values: Sequence[float]) -> None:
    ticks = apart([v for v in values if v > 0])
    if 0 < len(ticks) <= 8:
        axes.set_xticks(ticks, [byte_label(v) for v in ticks], fontsize=9)
        axes.minorticks_off()
