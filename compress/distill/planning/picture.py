"""Draw size against fidelity as one SVG that stands by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kilodelta.report import plots
from kilodelta.report.plots import Series
from kilodelta.sizes import byte_label

COLOURS = {
    "--ink": "#1b1f24",
    "--faint": "#57606a",
    "--line": "#d0d7de",
    "--c1": "#0969da",
    "--c2": "#bc4c00",
    "--c3": "#1a7f37",
    "--c4": "#8250df",
}
"""A picture in a page takes the page's colours; one that stands by itself has these."""


def picture(curve: Mapping[str, Any]) -> str:
    """Draw a curve as SVG.

    Args:
        curve: `Curve.to_json()`.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    sizes = curve["sizes"]
    names = list(dict.fromkeys(str(point["name"]) for point in sizes))
    series = [
        Series(
            name=name,
            x=[float(point["nbytes"]) for point in sizes if point["name"] == name],
            y=[float(point["agreement"]) for point in sizes if point["name"] == name],
        )
        for name in names
    ]
    beside = curve.get("beside", ())
    series += [
        Series(
            name=name,
            x=[float(size["nbytes"]) for size in beside if size["name"] == name],
            y=[float(size["agreement"]) for size in beside if size["name"] == name],
            reference=True,
        )
        for name in dict.fromkeys(str(size["name"]) for size in beside)
    ]
    largest = sizes[-1]
    svg = plots.lines(
        series,
        x="bytes of the file",
        y=f"agreement with the tuned model ({curve['kind']})",
        alt=f"Bytes against agreement; {byte_label(largest['nbytes'])} reach"
        f" {largest['agreement']:.3f}, the base alone {curve['base_agreement']:.3f}",
        logarithmic=True,
        levels={"base alone": float(curve["base_agreement"])},
        ticks=[float(point["nbytes"]) for point in sizes],
    )
    for variable, colour in COLOURS.items():
        svg = svg.replace(f"var({variable})", colour)
    return svg + "\n"
