"""Draw README's picture, bytes against accuracy, from a result of `fidelity.py`.

    python benchmarks/fidelity_picture.py benchmarks/results/fidelity-...json -o docs/fidelity.svg

Lines are means over the seeds. "SVD" is the truncated SVD of the change of the weights, in 4 bits:
what is left of a fine-tune without any training. "LoRA" is one of rank 1, the smallest over all
matrices, trained on the same inputs and steps as the files.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from kilodelta.report import plots
from kilodelta.report.html import DARK, LIGHT
from kilodelta.report.plots import Series
from kilodelta.sizes import byte_label

SET = "banking77"
TICKS = (4e3, 12e3, 25e3, 50e3, 120e3, 500e3)


def picture(result: Mapping[str, Any]) -> str:
    """Return the SVG of a result, in light and dark colours by the reader's preference."""
    seeds = list(result["sets"][SET].values())
    tuned, base = (fmean(seed[name]["accuracy"] for seed in seeds) for name in ("teacher", "base"))
    ours, svd = _line(seeds, r"\d+KB"), _line(seeds, "svd-.*")
    lora = _line(seeds, "lora-.*")
    small = min(ours)
    alt = (
        f"Accuracy on Banking77 by bytes of the file: kilodelta reaches {ours[small]:.1f} % at "
        f"{byte_label(small)} and {max(ours.values()):.1f} % at 50 KB, a truncated SVD "
        f"{svd[max(svd)]:.1f} % at 500 KB, "
        f"a LoRA trained alike {lora[min(lora)]:.1f} % at 22 KB; "
        f"the full fine-tune of 90.9 MB has {tuned:.1f} %, the base {base:.1f} %."
    )
    svg = plots.lines(
        [
            Series(name="kilodelta compress", x=list(ours), y=list(ours.values())),
            Series(name="SVD of the change, 4 bits", x=list(svd), y=list(svd.values())),
            Series(name="LoRA of rank 1, trained alike", x=list(lora), y=list(lora.values())),
        ],
        x="bytes of the file",
        y="accuracy on Banking77, %",
        alt=alt,
        logarithmic=True,
        levels={"the full fine-tune, 90.9 MB": tuned, "the base alone": base},
        ticks=TICKS,
    )
    style = f":root{{{LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    head, _, rest = svg.partition(">")
    paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    return f"{head}><style>{style}</style>{paper}{rest}\n"


def _line(seeds: list[Mapping[str, Any]], names: str) -> dict[float, float]:
    """Mean bytes to mean accuracy of the files whose names match a pattern, by bytes."""
    points: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    for seed in seeds:
        for name, point in seed.items():
            if re.fullmatch(names, name):
                points[name].append(point)
    return dict(
        sorted(
            (fmean(point["bytes"] for point in same), fmean(point["accuracy"] for point in same))
            for same in points.values()
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.write_text(picture(json.loads(given.result.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
