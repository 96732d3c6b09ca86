"""What a distillation learns from: rows to train on, rows held out, and the teacher's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from kilodelta.compress.distill.learn.chat_rows import chat_rows
from kilodelta.compress.distill.learn.comparisons import comparison_for
from kilodelta.compress.distill.learn.objective import Objective
from kilodelta.compress.distill.learn.outputs import Output, Wanted, run
from kilodelta.compress.distill.learn.rows import Rows, to_rows
from kilodelta.compress.distill.learn.survey import Survey, survey
from kilodelta.compress.distill.processes.ranks import ALONE, Ranks
from kilodelta.compress.distill.teacher.ask import Shelf, Teacher, ask
from kilodelta.errors import InputError
from kilodelta.models import LoadedModel, read_inputs, tokenize
from kilodelta.models.heads import EMBEDDING
from kilodelta.models.inputs.sources import ChatSource, Source
from kilodelta.progress import Progress

FEWEST = 8
"""Inputs below which nothing can be learnt and measured."""
HELD_OUT = 0.1
HELD_OUT_MOST = 512
READ = 256
"""Rows that are read, and tokenised, at a time."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Inputs to train on and inputs held out, with the teacher's outputs on each.

    Attributes:
        rows: all inputs.
        teacher: the tuned model's outputs on them.
        objective: which outputs count, and how they are compared.
        survey: what looking at the outputs found.
        learned: indices of the rows to train on; none of them equals a row that is held out.
        held_out: indices of the rows to measure on.
        repeated: how many rows are left out because they equal one that is held out.
        left_out: how many conversations are, because they were cut before an answer.
        ranks: this process among those that share the training.
    """

    rows: Rows
    teacher: Teacher
    objective: Objective
    survey: Survey
    learned: Sequence[int]
    held_out: Sequence[int]
    repeated: int
    left_out: int = 0
    ranks: Ranks = ALONE


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How inputs are used.

    Attributes:
        held_out: rows to measure on; a tenth, 512 at most, where it is None.
        batch: rows in a training batch.
        max_length: tokens that texts are cut to.
        seed: chooses the rows that are held out.
        labels: texts that embeddings are compared with.
        wanted: what is said about the outputs.
        coefficients: how many numbers are trained.
        all_tokens: of conversations, count every token rather than the assistant's.
    """

    held_out: int | None
    batch: int
    max_length: int | None
    seed: int
    labels: tuple[str, ...] | None
    wanted: Wanted
    coefficients: int
    all_tokens: bool = False


def gather(
    source: Source,
    student: LoadedModel,
    tuned: AbstractContextManager[LoadedModel],
    plan: Plan,
    progress: Progress,
    shelf: Shelf | None = None,
) -> Data:
    """Read the inputs, hold some out, and ask the teacher about all of them.

    Args:
        source: the inputs, opened.
        student: the base model in the tuned model's architecture.
        tuned: opens the tuned model, and closes it when all its outputs are kept.
        plan: how the inputs are used.
        progress: told about the teacher's work.
        shelf: where outputs are kept that do not fit in memory.

    Raises:
        InputError: too few inputs, inputs or outputs that do not fit, or labels for a model that
            embeds nothing.
    """
    with tuned as model:
        model = model.choosing(tuple(plan.wanted.weights))
        rows = read_rows(source, model, plan)
        learned, held_out = _halves(rows, plan)
        seen = survey(model, rows, plan.wanted)
        rows = rows if seen.padded else rows.unpadded()
        teacher, seen = ask(model, rows, seen, progress, shelf)
    return Data(
        rows=rows,
        teacher=teacher,
        objective=objective_for(seen.matched, teacher, learned, _labels(student, seen, plan), plan),
        survey=seen,
        learned=learned,
        held_out=held_out,
        repeated=len(rows) - len(learned) - len(held_out),
        left_out=(source.rows or 0) - len(rows) if isinstance(source, ChatSource) else 0,
        ranks=ALONE if shelf is None else shelf.ranks,
    )


def read_rows(source: Source, tuned: LoadedModel, plan: Plan) -> Rows:
    """Read the inputs as single rows.

    Args:
        source: the inputs, opened.
        tuned: the tuned model, which writes the targets that the inputs of an encoder-decoder lack:
            what is to be learnt follows its own texts, not the base's.
        plan: how the inputs are used.

    Raises:
        InputError: too few, or inputs that the model does not take.
    """
    if isinstance(source, ChatSource):
        rows = chat_rows(source, tuned, max_length=plan.max_length, all_tokens=plan.all_tokens).rows
        check_count(len(rows), source.spec, plan.held_out, plan.batch)
        return rows
    batches = read_inputs(source, tuned, batch_size=READ, max_length=plan.max_length)
    rows = to_rows(batches, getattr(tuned.tokenizer, "pad_token_id", None) or 0)
    check_count(len(rows), source.spec, plan.held_out, plan.batch)
    return rows


def check_count(count: int, spec: str, held_out: int | None, batch: int) -> int:
    """Return how many of so many rows are held out.

    Args:
        count: rows in all.
        spec: what the inputs are called.
        held_out: how many the user wants to hold out.
        batch: rows in a training batch.

    Raises:
        InputError: too few rows, or too few are left to learn from.

    Example:
        >>> check_count(1000, "texts.txt", None, 32)
        100
    """
    if count < FEWEST:
        present = "1 input" if count == 1 else f"{count} inputs"
        raise InputError(
            f"{spec} holds {present}; distillation needs at least {FEWEST}, better thousands",
            fix=f"give more inputs, which need no labels, and no --limit below {FEWEST}",
        )
    wanted = min(HELD_OUT_MOST, max(1, round(HELD_OUT * count))) if held_out is None else held_out
    left = count - max(1, batch // 8)  # of a batch, an eighth at least are different inputs
    if wanted < count and (left < 1 or (held_out is None and wanted > left)):
        raise InputError(
            f"{count} inputs are too few for batches of {batch}",
            fix=f"give more inputs, or a --batch of up to {8 * (count - wanted)}",
        )
    if not 1 <= wanted <= left:
        raise InputError(
            f"{wanted} of {count} inputs cannot be held out", fix="give a smaller --held-out"
        )
    return wanted


def _halves(rows: Rows, plan: Plan) -> tuple[list[int], list[int]]:
    """Choose rows to learn from and rows to measure on, no content in both."""
    generator = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    count = check_count(len(rows), "the inputs", plan.held_out, plan.batch)
    held_out = order[:count]
    measured = {rows.row_digest(index) for index in held_out}
    learned = [index for index in order[count:] if rows.row_digest(index) not in measured]
    if not learned:
        raise InputError(
            "every input equals one that is held out, so there is nothing to learn from",
            fix="give inputs that differ from each other, within --max-length and by tokens that"
            " the tokenizer knows",
        )
    return learned, held_out


def objective_for(
    matched: Sequence[Output],
    teacher: Teacher,
    learned: Sequence[int],
    labels: Tensor | None,
    plan: Plan,
) -> Objective:
    """Choose how each output is compared.

    Args:
        matched: the outputs.
        teacher: their values on all rows.
        learned: rows whose embeddings are the bank of others.
        labels: embeddings of the labels, (n, width).
        plan: says how many coefficients are trained.
    """
    return Objective(
        outputs=matched,
        comparisons=[
            comparison_for(
                output,
                bank=teacher.bank(output.name, learned) if output.kind == "embedding" else None,
                labels=labels,
                coefficients=plan.coefficients,
            )
            for output in matched
        ],
    )


def _labels(student: LoadedModel, seen: Survey, plan: Plan) -> Tensor | None:
    """Compute the base model's embeddings of the labels, (n, width)."""
    if plan.labels is None:
        return None
    if all(output.kind != "embedding" for output in seen.matched):
        names = ", ".join(output.name for output in seen.matched)
        raise InputError(
            f"--labels compares embeddings, but this model puts out {names}",
            fix="leave --labels away: logits are compared as they are",
        )
    with torch.no_grad():
        return run(student, tokenize(student, plan.labels))[EMBEDDING].float()
