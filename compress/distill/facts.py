"""List what makes two runs, or two sets of a teacher's outputs, the same: in words, with digests.

The state of an interrupted run holds the first list (`learn/state.py`), a kept set of a teacher's
outputs the second (`teacher/store.py`); whoever reads them again compares.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.learn.data import Data
from kilodelta.compress.distill.learn.schedule import Schedule
from kilodelta.compress.distill.precisions.ways import START
from kilodelta.compress.distill.precisions.wishes import IN_GRID
from kilodelta.compress.training.products.rounded import FLOAT32
from kilodelta.files.checkpoint import read_config
from kilodelta.files.model_digest import digest


def teacher_facts(job: Job) -> dict[str, str]:
    """List what the teacher's outputs depend on, beside the inputs and the outputs themselves."""
    return {
        "base model": digest(job.pair.base, cached=True).root,
        "tuned model": digest(job.pair.tuned, cached=True).root,
        "computed in": _computed_in(job),
        **_module(job),
    }


def _module(job: Job) -> dict[str, str]:
    """Say what computes with the weights: the user's function, or configuration and pooling."""
    teacher = job.pair.teacher
    assert teacher is not None  # the caller has inputs
    built_by = {str(files.path): files for files in (job.pair.base, job.pair.tuned)}
    # A tuned model that is a bare file is opened by the base's configuration.
    config = read_config(built_by.get(teacher.source, job.pair.tuned))
    pooling = {} if teacher.pooling is None else {"pooling": str(teacher.pooling)}
    return {"module": job.options.model or json.dumps(config, sort_keys=True), **pooling}


def _computed_in(job: Job) -> str:
    """Return the type of the weights that the models compute with."""
    assert job.pair.student is not None  # the caller has inputs
    floats = (p.dtype for p in job.pair.student.module.parameters() if p.is_floating_point())
    return str(next(floats, "")).removeprefix("torch.")


def run_facts(
    job: Job, data: Data, schedule: Schedule, labels: tuple[str, ...] | None
) -> dict[str, str]:
    """List in words what makes two runs the same, for a run that is to be resumed.

    Args:
        job: what was settled before the first step.
        data: what is learnt from.
        schedule: how long and how fast.
        labels: texts of the labels that embeddings are compared by.
    """
    held_out = json.dumps([list(data.held_out), list(data.learned)])
    outputs = [[o.name, o.kind, o.weight, o.axis] for o in data.survey.matched]
    hottest = max(comparison.temperature for comparison in data.objective.comparisons)
    return {
        "base model": digest(job.pair.base).root,
        "tuned model": digest(job.pair.tuned).root,
        "inputs (--inputs, --limit, --max-length, --field)": data.rows.digest(),
        "held-out inputs (--held-out, --seed)": _short_digest(held_out),
        "--labels": _short_digest("\n".join(labels or ())),
        "--model": job.options.model or "",
        "configuration": _short_digest(json.dumps(_module(job), sort_keys=True)),
        "--dtype": _computed_in(job),
        "method": json.dumps(job.method.to_manifest(), sort_keys=True),
        "targets": json.dumps(asdict(job.patterns), sort_keys=True),
        "--extras": json.dumps([change.name for change in job.split.extras]),
        "outputs": json.dumps(outputs),
        **({"--for": ",".join(job.precisions)} if job.precisions else {}),
        **({"start in the grid": str(START)} if IN_GRID in job.precisions else {}),
        **({"products": schedule.products} if schedule.products != FLOAT32 else {}),
        # What an earlier version began with the plain divergence is another training.
        **({"loss": f"half at temperature {hottest:g}"} if hottest > 1 else {}),
        **{f"--{key}": str(value) for key, value in asdict(schedule).items() if key != "products"},
    }


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
