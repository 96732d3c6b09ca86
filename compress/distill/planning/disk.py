"""Ask before the first step whether disks hold what a run writes: its file, its state, the curve.

A training that ends at a full disk has lost hours. What it will write is known before: the file's
header and coefficients are counted (`job/choice.py`), and the state of an interrupted run is a few
numbers for each one that is trained. The teacher's outputs come after one row of them is known
(`teacher/ask.py`), and are then asked for together with these.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.job.choice import DEFAULT_BUDGET, file_bytes
from kilodelta.compress.distill.learn import state as states
from kilodelta.compress.distill.learn import tune
from kilodelta.compress.distill.options import Options
from kilodelta.files.staging import Need, require_room

NUMBERS = 4
"""Float32 numbers of a state for each one that is trained: it, two moments, and the best one. An
extra in 16 bits has a float32 master beside it, and takes no more."""
TENSOR = 600
"""Bytes that a tensor of a state takes beside its numbers: its name, twice, and the alignment of a
zip archive, measured with torch 2.13."""
TEXTS = 1 << 14
"""Bytes of a state's or a search's facts, curve and trials."""
FIX = "give a folder with -o on a larger disk that you may write to, or a smaller --budget"


def require_place(out: Path, options: Options) -> None:
    """Check, before a model is opened, that a disk takes the file, as far as its size is known.

    Raises:
        OutputError: the folder cannot be written to, or its disk is full.
    """
    bought = options.method is None or isinstance(options.method, str)
    nbytes = options.budget or (DEFAULT_BUDGET if bought else 1)
    require_room(Need(path=out, nbytes=nbytes, what=f"{out}"), fix=FIX)


def needs_of(job: Job, *, learns: bool) -> tuple[Need, ...]:
    """List what a job writes beside its output: the file, and the state of its run.

    Args:
        job: what is settled before the first step.
        learns: whether it is trained, so that its state is kept while it is.
    """
    file = Need(path=job.out, nbytes=file_bytes(job), what=f"{job.out.name}")
    if not learns:
        return (file,)
    kept, trials = states.place_of(job.out), tune.place_of(job.out)
    # A new state is written in full before the one before it goes.
    copies = 1 if kept.exists() else 2
    state = Need(path=kept, nbytes=copies * state_bytes(job), what="the state of its run")
    if job.options.tune is None:
        return file, state
    return file, state, Need(path=trials, nbytes=TEXTS, what="its trials")


def state_bytes(job: Job) -> int:
    """Count the most bytes that the state of an interrupted run takes."""
    extras = job.split.extras
    numbers = job.coefficients + sum(prod(change.shape) for change in extras)
    tensors = len(job.targets) + len(extras) + 8
    return 4 * NUMBERS * numbers + TENSOR * 4 * tensors + TEXTS


def needs_of_curve(folder: Path, job: Job, budgets: Sequence[int], teacher: int) -> list[Need]:
    """List what a curve writes: a file for each budget, the state of a run, and the teacher's.

    Args:
        folder: of the curve.
        job: of the largest budget.
        budgets: bytes of the files.
        teacher: bytes of the teacher's outputs.
    """
    files = Need(path=folder / "files", nbytes=sum(budgets), what=f"{len(budgets)} files")
    state = Need(path=folder / "state", nbytes=2 * state_bytes(job), what="the state of a run")
    cache = Path(job.options.teacher_cache or folder / "teacher")
    if cache.exists():  # it may hold them: `ask` counts those that are missing
        return [files, state]
    outputs = Need(path=cache / "rows", nbytes=teacher, what="the teacher's outputs")
    return [files, state, outputs]
