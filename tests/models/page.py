"""Make docs/models.md from the results of `tests.models.table`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# ruff: noqa: E501  (rows of a Markdown table are one line each)

STEPS = ("compress", "merge", "export", "verify", "adapter", "patch", "engine")
_MARKS = {"right": "yes", "refused": "refused", "WRONG": "**wrong**", "TRACEBACK": "**error**"}
_HEAD = """# Which architectures work

Written by `python -m tests.models.table` from `tests/models/results.json`; nothing here is typed.
Each architecture of transformers is built tiny, with random weights, from its configuration; a
copy is tuned (every matrix changed); and both go through these steps. The last rows are plain
modules of torch with a linear head, which `--model` builds and whose files are bare weights.

| step | "yes" means |
|---|---|
| compress | a LoRA of rank 2 over the default targets, trained for 4 steps on inputs: how well so few steps do is not the question here |
| merge | proved; transformers (or the module) opens the merged folder, and it computes something else than the base |
| export | ONNX Runtime computes every output of the exported graph as transformers (or the module) does of the merged folder, within 0.1 %, on inputs of three sizes |
| verify | `kilodelta verify` of that export, with inputs, passes |
| adapter | a device folder of adapter mode takes the file (`apply`), and computes so at three sizes |
| patch | a device folder of patch mode does |
| engine | TensorRT-RTX builds an engine for GPUs of compute capability 8.6; it is not run. `built`: so it does of another tiny model of the architecture, and the engine can be patched (`benchmarks/results/rtx-survey-2026-11-28-epyc.json`) |

`-` is not tried: a step before it did not end right, or the run was not that long. Three
sizes are three numbers of rows and lengths; images have one size here, in three numbers of rows.
`yes*`: with a remark below, such as an axis that is fixed in the graph, which says so; then only
sizes that fit it were compared.

"""


def surveyed(survey: Mapping[str, Any]) -> frozenset[str]:
    """Return the architectures of which a survey of engines built one, as the table calls them."""
    return frozenset(row["model"].replace("_", "-") for row in survey["rows"] if row.get("builds"))


def page(results: Mapping[str, Any], engines: Collection[str] = ()) -> str:
    """Return the page as Markdown.

    Args:
        results: what `tests.models.table` has kept.
        engines: architectures of which engines are known from elsewhere (`surveyed`).
    """
    rows = results["architectures"]
    kinds = Counter(kind(row["steps"]) for row in rows.values())
    versions = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    whole = sum(
        kind(row["steps"]) == "right" and set(STEPS[:-1]) <= row["steps"].keys()
        for row in rows.values()
    )
    tried = sum("engine" in row["steps"] or name in engines for name, row in rows.items())
    lines = [
        f"Of {len(rows)} architectures {whole} are right in every step from compress to patch, and "
        f"{kinds['right'] - whole} as far as they were taken; {kinds['refused']} are refused at "
        f"some step by a sentence, {kinds['WRONG']} give a wrong result, and {kinds['TRACEBACK']} "
        f"end in an error that is none of ours. Engines were built for {tried}. "
        f"Versions: {versions}.\n",
        f"| architecture | class | {' | '.join(STEPS)} |",
        f"|---|---|{'---|' * len(STEPS)}",
        *(_row(name, row, is_built=name in engines) for name, row in rows.items()),
    ]
    notes = [note for name, row in rows.items() for note in _notes(name, row["steps"])]
    said = ["", "## What is not right, and remarks", "", *notes] if notes else []
    return _HEAD + "\n".join([*lines, *said]) + "\n"


def kind(steps: Mapping[str, str]) -> str:
    """Return the worst that happened in a row: `right`, `refused`, `WRONG` or `TRACEBACK`."""
    happened = {outcome.partition(":")[0] for outcome in steps.values()}
    return next(worst for worst in reversed(_MARKS) if worst in happened)


def _row(name: str, row: Mapping[str, Any], *, is_built: bool) -> str:
    marks = [_mark(row["steps"].get(step, "")) for step in STEPS]
    if is_built and "engine" not in row["steps"]:
        marks[STEPS.index("engine")] = "built"
    return f"| {name} | `{row['class']}` | {' | '.join(marks)} |"


def _mark(outcome: str) -> str:
    if not outcome:
        return "-"
    word, colon, _ = outcome.partition(":")
    return _MARKS[word] + ("*" if colon and word == "right" else "")


def _notes(name: str, steps: Mapping[str, str]) -> Iterator[str]:
    for step, outcome in steps.items():
        word, _, said = outcome.partition(": ")
        if said:
            mark = "" if word == "right" else f"{word}: "
            # Angle brackets and stars in an error are text, not markup.
            yield f"- {name}, {step}: {mark}`{said.replace('`', chr(39))}`"
