"""Merging and training on a GPU, side by side with official NOLA, PEFT, and the card itself.

    python benchmarks/gpu.py [--json FILE] [--device cuda:N]

Prints ratios first, beside what is wanted of a data-centre GPU. The measurements are those of
`python -m kilodelta.verify.gpu --only speed` (`verify/gpu/speed.py`). Opponents run in the same
process, in rotation with ours, after warming up:

- reading and writing all weights once, which is the least that a merge can do;
- the official NOLA way: draw uniform(-1, 1) bases with a seeded torch generator, einsum, add;
- the rate of a large `torch._int_mm`, for the number of operations that RandLoRA's product takes;
- HF PEFT's RandLora layer: its own `get_delta_weight`, its bases there already;
- a training step of PEFT's LoRA of the same rank.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from machine import describe

from kilodelta.verify.gpu import machine
from kilodelta.verify.gpu.measure import Measure
from kilodelta.verify.gpu.part import PartRow, Setting


def main() -> int:
    """Measure, print one table, and write the JSON; 77 where there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu: a small trial")
    options = parser.parse_args()
    why = machine.no_device() if options.device.startswith("cuda") else ""
    if why:
        print(f"not run: {why}")
        return machine.SKIPPED
    report = measured(options.device)
    print(table(report))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def measured(device: str) -> dict[str, Any]:
    """The machine, what was measured, and what was not."""
    from kilodelta.verify.gpu.speed import measures

    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device=device, folder=Path(folder), small=device == "cpu")
        found = list(measures(setting))
    return {
        "machine": {**describe(), **machine.describe()},
        "rows": [measure.to_json() for measure in found if isinstance(measure, Measure)],
        "not run": {row.what: row.found for row in found if isinstance(row, PartRow)},
    }


def table(report: dict[str, Any]) -> str:
    """The machine's description, then a line for each measurement."""
    lines = [f"{name:10} {value}" for name, value in report["machine"].items()]
    lines += ["", f"{'ratio':>8}  {'wanted':>7}  {'kilodelta':>12}  {'opponent':>12}  what"]
    lines += [_line(row) for row in report["rows"]]
    return "\n".join([*lines, *(f"{what}: {why}" for what, why in report["not run"].items())])


def _line(row: dict[str, Any]) -> str:
    unit, factor = ("ms", 1e3) if row["unit"] == "s" else ("MiB", 2.0**-20)
    ours, theirs = row["kilodelta"] * factor, row["opponent"] * factor
    missed = "  MISSED" if row["holds"] is False else ""
    return (
        f"{row['ratio']:>7.2f}x  {row['wanted'] or '':>7}  {ours:>8.3f} {unit:3}"
        f"  {theirs:>8.3f} {unit:3}  {row['what']}: {row['against']}{missed}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
