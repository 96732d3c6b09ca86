"""Say which run the points of a curve are of, so that `--resume` never joins those of two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from kilodelta.compress.distill.facts import teacher_facts
from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.options import Options
from kilodelta.errors import InputError
from kilodelta.files import plain

ANYWHERE = {"budget", "teacher_cache", "device", "threads", "shard", "gradient_checkpointing"}
"""Options that say where or in which memory a file is made, or that each point has its own of."""
SPELLED = {"rate": "lr", "precisions": "for"}


def curve_facts(job: Job, inputs: str | Path, options: Options) -> dict[str, str]:
    """List in words what makes two curves the same run, budgets aside.

    Args:
        job: of one of the budgets; its models are open.
        inputs: as the user named them.
        options: of all budgets.
    """
    chosen = {name: value for name, value in asdict(options).items() if name not in ANYWHERE}
    chosen["labels"] = options.labels and _digest_of(Path(options.labels))
    return {
        **teacher_facts(job),
        "inputs": _digest_of(Path(inputs)),
        **{
            f"--{SPELLED.get(name, name).replace('_', '-')}": json.dumps(value, default=str)
            for name, value in chosen.items()
        },
    }


def require_same_run(folder: Path, facts: Mapping[str, str], kept: Mapping[str, object]) -> None:
    """Check that a curve that is to go on is of this run.

    Args:
        folder: of the curve.
        facts: what this run is.
        kept: what the run of the points in the folder was.

    Raises:
        InputError: it was another one; what differs is named.
    """
    differing = [name for name in {**kept, **facts} if kept.get(name) != facts.get(name)]
    if differing:
        raise InputError(
            f"{folder} holds a curve of a run with other {', '.join(map(str, differing))}",
            fix="give the same arguments, begin anew by --force, or give another folder with -o",
        )


def _digest_of(path: Path) -> str:
    """Return the digest of a file or a folder; the name of a function that gives inputs."""
    return plain.digest(path) if path.exists() else str(path)
