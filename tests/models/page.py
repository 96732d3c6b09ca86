"""Make docs/models.md from the results of `tests.models.table`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
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
| engine | TensorRT-RTX builds an engine for GPUs of compute capability 8.6; it is not run |

`-` is not tried: a step before it did not end right, or the run was not that long. Three
sizes are three numbers of rows and lengths; images have one size here, in three numbers of rows.
`yes*`: some axis is fixed in the graph, which says so, and only sizes that fit it were compared.

"""


def page(results: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    rows = results["architectures"]
    kinds = Counter(kind(row["steps"]) for row in rows.values())
    versions = ", ".join(f"{name} {version}" for name, version in results["packages"].items())
    whole = sum(
        kind(row["steps"]) == "right" and set(STEPS[:-1]) <= row["steps"].keys()
        for row in rows.values()
    )
    tried = sum("engine" in row["steps"] for row in rows.values())
    lines = [
        f"Of {len(rows)} architectures {whole} are right in every step from compress to patch, and "
        f"{kinds['right'] - whole} as far as they were taken; {kinds['refused']} are refused at "
        f"some step by a sentence, {kinds['WRONG']} give a wrong result, and {kinds['TRACEBACK']} "
        f"end in an error that is none of ours. Engines were tried for {tried}. "
        f"Versions: {versions}.\n",
        f"| architecture | class | {' | '.join(STEPS)} |",
        f"|---|---|{'---|' * len(STEPS)}",
        *(_row(name, row) for name, row in rows.items()),
    ]
    notes = [note for name, row in rows.items() for note in _notes(name, row["steps"])]
    said = ["", "## What is not right, and remarks", "", *notes] if notes else []
    return _HEAD + "\n".join([*lines, *said]) + "\n"


def kind(steps: Mapping[str, str]) -> str:
    """Return the worst that happened in a row: `right`, `refused`, `WRONG` or `TRACEBACK`."""
    happened = {outcome.partition(":")[0] for outcome in steps.values()}
    return next(worst for worst in reversed(_MARKS) if worst in happened)


def _row(name: str, row: Mapping[str, Any]) -> str:
    marks = (_mark(row["steps"].get(step, "")) for step in STEPS)
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
