"""Make a delta out of a fine-tuned model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kilodelta import terminal
from kilodelta.commands.common import Command, as_json, with_dry_run, with_progress
from kilodelta.commands.compress_options import how_to_compress
from kilodelta.errors import require

if TYPE_CHECKING:
    from kilodelta.compress.distill.report import Report

_COUNTS = {
    "top-1": "top-1",
    "yes-no": "yes or no",
    "cosine": "cosine",
    "r2": "R2",
    "mixed": "agreement",
}
"""What the agreement counts, as the terminal names it."""
_NO_REFIT = "no: TensorRT refits no codes"
INTERRUPTED = 130
"""The exit code of a run that Ctrl-C stopped: 128 and the signal's number, as shells have it."""


@click.command(
    cls=Command,
    short_help="Distil a fine-tuned model into a .kd file over its base.",
    examples=[
        "kilodelta compress base/ tuned/ -o task.kd --inputs texts.jsonl --budget 20KB",
        "kilodelta compress base/ tuned/ -o task.kd --method lora --rank 4",
        "kilodelta compress base-w4a16/ tuned/ -o task.kd --inputs x.jsonl --for beside,in-grid",
    ],
)
@click.argument("base", type=click.Path())
@click.argument("tuned", type=click.Path())
@click.option("-o", "--out", required=True, type=click.Path(), help="The .kd file to write.")
@click.option(
    "--inputs",
    help="Unlabelled inputs: .jsonl, .txt, .npz, or package.module:function yielding batches.",
)
@click.option("--budget", help="Bytes of the whole file, such as 20KB (the default).")
@click.option("--rank", type=click.IntRange(1), help="Rank of the method.")
@click.option("--bases", type=click.IntRange(1), help="Bases of NOLA, or Uni-LoRA's vector.")
@how_to_compress
@click.option(
    "--for",
    "precisions",
    metavar="PRECISION[,...]",
    help="Train and measure for each: beside,in-grid of a quantised BASE (the default there); of a"
    " float one fp32, fp16, int4-g32, int4-g64, int4-g128, nvfp4, fp8.",
)
@click.option(
    "--min-agreement",
    type=click.FloatRange(-1, 1),
    help="Exit 12 if it keeps less, in any of --for.",
)
@click.option("--name", default="", help="What the base is called; its folder's name by default.")
@click.option("--force", is_flag=True, help="Replace the .kd file, and forget a run towards it.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--report", type=click.Path(), help="Write what was kept as an HTML page as well.")
@as_json
@with_progress
@with_dry_run
def compress(
    base: str,
    tuned: str,
    out: str,
    inputs: str | None,
    force: bool,
    resume: bool,
    report: str | None,
    as_json: bool,
    progress: Any,
    **given: Any,
) -> Callable[[], None]:
    """Distil a TUNED model into a .kd file of kilobytes over its BASE.

    Without --inputs only --method lora is possible: a truncated SVD of the change.

    Ctrl-C stops the training: the best state so far is written, the exit code is 130, and --resume
    goes on.
    """
    from kilodelta.compress.distill.options import check, options_from

    options = options_from(**given)
    check(options, learns=inputs is not None)  # a slip is answered before torch is imported
    require("torch", extra="hf", why="train a delta's coefficients")
    from kilodelta.compress.distill.compress import compress

    made = compress(
        base,
        tuned,
        out,
        inputs=inputs,
        options=options,
        force=force,
        resume=resume,
        report=report,
        progress=progress,
    )
    return lambda: _end(made, as_json=as_json)


def _end(report: Report, *, as_json: bool) -> None:
    if terminal.speaks():
        show(report, as_json=as_json)
    if report.interrupted:
        raise SystemExit(INTERRUPTED)


def show(report: Report, *, as_json: bool) -> None:
    """Print what a compression kept and what it cost; warnings go to stderr."""
    from kilodelta.format.method_options import options_in_words

    for warning in report.warnings:
        terminal.print_warning(warning)
    if as_json:
        terminal.print_json({**report.to_json(), "modes": modes(report)})
        return
    options = options_in_words(report.method)
    whole = report.nbytes["file"]
    times = report.tuned_bytes / whole
    rows: list[tuple[str, object]] = [
        ("file", f"{report.path}, {terminal.size(whole)}: {times:,.0f}x smaller"),
        ("method", f"{report.method['name']}: {options}, {report.bits} bits"),
        ("targets", f"{report.targets} tensors"),
        *(("extra", name) for name in report.extras),
        *_measures(report),
        *(("in", line) for line in _fidelity(report)),
        ("verdict", _verdict(report)),
        *_beside(report),
        ("weights", f"error {report.weight_error:.3f} of the whole change (1 is the base's)"),
        ("time", _time(report)),
        *(("bytes", f"{count:>9}  {part}") for part, count in report.nbytes.items()),
    ]
    if report.config:
        rows.append(("config", f"{', '.join(report.config)}: merge puts them into config.json"))
    if report.dropped:
        names = ", ".join(change.name for change in report.dropped[:3])
        names += ", ..." if len(report.dropped) > 3 else ""
        rows.append(
            (
                "not stored",
                f"{_tensors(len(report.dropped))} with "
                f"{report.dropped_energy:.1%} of the change ({names}); see --extras",
            )
        )
    rows += [("mode", f"{mode}: {answer}") for mode, answer in modes(report).items()]
    terminal.print_facts([*rows, ("result", report.result)])


def _tensors(count: int) -> str:
    return "1 changed tensor" if count == 1 else f"{count} changed tensors"


def _time(report: Report) -> str:
    steps = f"{report.seconds:.0f} s, {report.steps} steps"
    return f"{steps} in {report.dtype}" if report.dtype else steps


def _verdict(report: Report) -> str:
    """Say the result in one sentence: good, to look at twice, or not good, and what to do next."""
    from kilodelta.report.verdict import WORDS, verdict_of

    judged = verdict_of(report.to_json())
    return f"{WORDS[judged.level]}: {judged.text}" + (f"; {judged.advice}" if judged.advice else "")


def _measures(report: Report) -> list[tuple[str, object]]:
    """Say what agreement and divergence are, over all outputs and for each of several."""
    if report.after is None or report.before is None:
        return []
    before, after = report.before, report.after
    rows: list[tuple[str, object]] = [
        (
            _COUNTS[report.kind],
            f"{after.agreement:.4f} with the tuned model on {report.held_out} held-out inputs;"
            f" the base alone {before.agreement:.4f}",
        ),
        ("divergence", f"{after.divergence:.4f}, the base's {before.divergence:.4f}"),
    ]
    for one in report.outputs:
        along = "" if one.axis is None else f" along axis {one.axis}"
        along += f" ({one.size})" if one.size else ""
        rows.append(
            (
                "output",
                f"{one.name}: {one.kind}{along}, {_COUNTS[one.counts]} {one.after.agreement:.4f},"
                f" the base's {one.before.agreement:.4f}",
            )
        )
    return rows


def _beside(report: Report) -> list[tuple[str, object]]:
    """Say what other ways keep in about as many bytes, where that was measured."""
    return [
        (
            "beside",
            f"{size.name}, {size.how}: {terminal.size(size.nbytes)}, {size.agreement:.4f}",
        )
        for size in report.sizes[1:]
    ]


def _fidelity(report: Report) -> list[str]:
    """Say what the file keeps in each precision that it was made for."""
    lines = []
    for one in report.fidelity:
        changed = one.codes_changed
        codes = (
            "" if changed is None else f"; merged in the grid, {changed:.1%} of the codes change"
        )
        lines.append(f"{one.name}: {_COUNTS[report.kind]} {one.agreement:.4f}{codes}")
    return lines


def modes(report: Report) -> dict[str, str]:
    """Say which device modes accept the file: the mode's name to `yes ...` or `no: ...`."""
    head = f", bundled with --config TUNED for {', '.join(report.new[:3])}" if report.new else ""
    whole = [name for name in report.extras if name not in report.new]
    if report.method["name"] == "randlora":
        adapter = "no: the update has full rank"
    elif whole:
        adapter = f"no: it stores {', '.join(whole[:3])} whole"
    else:
        adapter = f"yes, in a bundle of rank {report.method['rank']} or more{head}"
    refit = _NO_REFIT if report.quantised else f"yes{head}"
    return {"adapter": adapter, "patch": f"yes{head}", "refit": refit}
