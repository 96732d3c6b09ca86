"""What a distillation learns from: inputs, the teacher's word on each, and what counts as equal."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kilodelta.compress.distill.job import Job
from kilodelta.compress.distill.objective import Objective, objective_for
from kilodelta.compress.distill.options import Options
from kilodelta.compress.distill.rows import Rows, to_rows
from kilodelta.compress.distill.teacher import Teacher
from kilodelta.errors import InputError
from kilodelta.models import open_model, outputs, read_inputs, read_texts, tokenize
from kilodelta.models.heads import EMBEDDING
from kilodelta.progress import Progress

HELD_OUT = 0.1
HELD_OUT_MOST = 512


@dataclass(frozen=True, kw_only=True)
class Data:
    """Inputs to train on and inputs held out, with the teacher's word on each."""

    rows: Rows
    teacher: Teacher
    objective: Objective
    learned: Sequence[int]
    held_out: Sequence[int]
    digest: str
    """Of what the inputs were read from, 12 hexadecimal digits."""


def gather(job: Job, inputs: str | Path, progress: Progress) -> Data:
    """Read the inputs, hold some out, and ask the teacher about all of them.

    Raises:
        InputError: too few inputs, or labels for a model that embeds nothing.
    """
    options = job.options
    teacher = open_model(options.model or str(job.tuned.path), weights=job.tuned)
    rows = _rows(job, inputs)
    order = torch.randperm(
        len(rows), generator=torch.Generator().manual_seed(options.seed)
    ).tolist()
    count = _held_out(len(rows), options)
    voice = Teacher(teacher, rows, progress)
    bank = voice.bank
    learned = order[count:]
    labels = _labels(job, voice.output)
    return Data(
        rows=rows,
        teacher=voice,
        objective=objective_for(
            voice.output,
            None if bank is None else bank[learned],
            labels,
            coefficients=job.coefficients,
        ),
        learned=learned,
        held_out=order[:count],
        digest=digest_of(inputs),
    )


def _labels(job: Job, output: str) -> torch.Tensor | None:
    """The base model's embeddings of the labels, (n, width)."""
    spec = job.options.labels
    if spec is None:
        return None
    if output != EMBEDDING:
        raise InputError(
            f"--labels compares embeddings, but this model puts out {output}",
            fix="leave --labels away: logits are compared as they are",
        )
    with torch.no_grad():
        return outputs(job.student, tokenize(job.student, read_texts(spec)))[EMBEDDING]


def _rows(job: Job, inputs: str | Path) -> Rows:
    options = job.options
    batches = read_inputs(
        inputs,
        job.student,
        limit=options.limit,
        batch_size=256,
        field=options.field,
        max_length=options.max_length,
    )
    pad = getattr(job.student.tokenizer, "pad_token_id", None) or 0
    rows = to_rows(batches, pad)
    if len(rows) < 8:
        raise InputError(
            f"{inputs} holds {len(rows)} inputs; distillation needs at least 8, better thousands",
            fix="give more inputs; they need no labels",
        )
    return rows


def _held_out(count: int, options: Options) -> int:
    wanted = options.held_out
    if wanted is None:
        wanted = min(HELD_OUT_MOST, max(1, round(HELD_OUT * count)))
    if not 1 <= wanted <= count - options.batch // 8:
        raise InputError(
            f"{wanted} of {count} inputs cannot be held out", fix="give a smaller --held-out"
        )
    return wanted


def digest_of(inputs: str | Path) -> str:
    """12 hexadecimal digits that name a file by its content, a function by its name."""
    path = Path(inputs)
    data = path.read_bytes() if path.is_file() else str(inputs).encode()
    return hashlib.sha256(data).hexdigest()[:12]
