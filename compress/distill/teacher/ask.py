"""Compute the tuned model's outputs on all inputs, once, and serve them to every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kilodelta.compress.distill.learn.gradient.pieces import by_halves
from kilodelta.compress.distill.learn.outputs import Output, run
from kilodelta.compress.distill.learn.rows import Rows
from kilodelta.compress.distill.learn.survey import Survey
from kilodelta.compress.distill.processes.ranks import ALONE, Ranks
from kilodelta.compress.distill.teacher.same import require_same
from kilodelta.compress.distill.teacher.store import (
    DiskStore,
    Facts,
    MemoryStore,
    Store,
    folder_of,
    padded,
    require_disk,
)
from kilodelta.compress.distill.teacher.top_k import LARGEST, TOP_K, shorten
from kilodelta.errors import InputError, OutputError
from kilodelta.files import staging
from kilodelta.models import LoadedModel
from kilodelta.progress import Event, Progress

ROOM = 1 << 28
"""Bytes of whole outputs up to which they are kept as they are, in memory. Beyond, distributions
over many classes are shortened, and everything lies on disk."""
BATCH = 64
CELLS = 1 << 25
"""Numbers of one output of one batch: 64 MB in bfloat16."""
CHUNK = 1 << 22
"""Logits that are shortened at a time."""


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Where outputs are kept that do not fit in memory, or that later runs are to find.

    Attributes:
        cache: the user's folder; None for a place that ends with the run.
        facts: what the outputs depend on, beside what `ask` adds; asked for where `cache` is given.
        scratch: makes a folder that ends with the run.
        ranks: this process among those that share the work. Several keep the outputs on disk.
        beside: what else the run writes, perhaps on the disk where outputs are kept.
    """

    cache: Path | None
    facts: Callable[[], Facts]
    scratch: Callable[[], Path]
    ranks: Ranks = ALONE
    beside: tuple[staging.Need, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the outputs of all rows take.

    Attributes:
        whole: bytes of the outputs as they are.
        kept: bytes with the outputs in `shortened` at their k classes.
        shortened: by the name of each output that is shortened, k.
    """

    whole: int
    kept: int
    shortened: Mapping[str, int]

    @property
    def is_small(self) -> bool:
        """Whether memory holds them."""
        return self.whole < ROOM


class Teacher:
    """The tuned model as a function from rows to the outputs that are matched."""

    def __init__(self, store: Store, survey: Survey) -> None:
        self._store, self._survey = store, survey

    def __call__(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Return the outputs of rows of one batch, (rows, ...), by name."""
        parts = [self._store.row(index) for index in chosen]
        return {o.name: padded([part[o.name] for part in parts]) for o in self._survey.matched}

    def bank(self, name: str, chosen: Sequence[int]) -> Tensor:
        """Return an embedding's values, (rows, width)."""
        return torch.stack([self._store.row(index)[name] for index in chosen])


def ask(
    loaded: LoadedModel,
    rows: Rows,
    survey: Survey,
    progress: Progress,
    shelf: Shelf | None = None,
) -> tuple[Teacher, Survey]:
    """Compute what the tuned model puts out for all rows, or find it where it was kept.

    Args:
        loaded: the tuned model; it is not needed afterwards.
        rows: the inputs.
        survey: what its outputs are.
        progress: told about every batch.
        shelf: where outputs lie that do not fit in memory; memory alone without one.

    Returns:
        The outputs, and the survey with `kept` set on each output that is shortened.

    Raises:
        InputError: an output is not finite, or the cache holds those of another run or model.
        OutputError: the disk has no room for them.
    """
    need = estimate(loaded, rows, survey)
    whole = survey
    matched = tuple(replace(o, kept=need.shortened.get(o.name, 0)) for o in survey.matched)
    survey = replace(survey, matched=matched)
    ranks = ALONE if shelf is None else shelf.ranks
    store = _store(rows, survey, need, shelf)
    if isinstance(store, DiskStore) and 0 not in store.missing():
        now = ranks.agree(partial(_compute, loaded, rows, whole, [0]))
        first = store.row(0)
        check = partial(require_same, str(store.folder), matched, now, first, rows.mask([0]))
        ranks.agree(check)
    _fill(store, loaded, rows, survey, progress, ranks)
    ranks.gather(None)  # the first process has written everything
    if isinstance(store, DiskStore) and not ranks.writes:
        store.reopen()
    return Teacher(store, survey), survey


def compute(loaded: LoadedModel, rows: Rows, survey: Survey, progress: Progress) -> Teacher:
    """Compute the outputs of a few rows in memory, shortened as the survey says.

    Args:
        loaded: the tuned model.
        rows: what it is asked.
        survey: which outputs are matched, and how they are kept.
        progress: called as the teacher works.
    """
    store = MemoryStore(len(rows))
    _fill(store, loaded, rows, survey, progress)
    return Teacher(store, survey)


def estimate(loaded: LoadedModel, rows: Rows, survey: Survey) -> Need:
    """Judge what the outputs of all rows take by those of the first row."""
    first = _compute(loaded, rows, survey, [0])
    tokens, one = sum(map(rows.length, range(len(rows)))), rows.length(0)
    each = {
        o.name: first[o.name].nbytes * tokens // one if o.token_axes
        else first[o.name].nbytes * len(rows)
        for o in survey.matched
    }  # fmt: skip
    whole = sum(each.values())
    shortened: dict[str, int] = {}
    if whole >= ROOM:
        shortened = {o.name: TOP_K for o in survey.matched if _is_long(o, first[o.name])}
    kept = {n: b * (2 * TOP_K + 1) // first[n].shape[-1] for n, b in each.items() if n in shortened}
    return Need(whole=whole, kept=sum({**each, **kept}.values()), shortened=shortened)


def _is_long(output: Output, values: Tensor) -> bool:
    """Return whether few of an output's many classes say nearly all of its distribution."""
    last = output.kind == "classes" and output.axis == values.dim() - 1
    return last and 4 * TOP_K <= output.size < LARGEST


def _store(rows: Rows, survey: Survey, need: Need, shelf: Shelf | None) -> Store:
    alone = shelf is None or shelf.ranks.count == 1
    if shelf is None or (need.is_small and shelf.cache is None and alone):
        return MemoryStore(len(rows))
    if shelf.cache is None:
        folder = shelf.ranks.first(shelf.scratch)
        shelf.ranks.agree(partial(require_disk, folder, need.kept, shelf.beside))
        return shelf.ranks.agree(partial(DiskStore, folder, {}, len(rows)))
    outputs = [[o.name, o.kind, o.axis, o.size, o.kept] for o in survey.matched]
    facts = {**shelf.facts(), "inputs": rows.digest(), "outputs": str(outputs)}
    folder = folder_of(shelf.cache, facts)
    # All have read what is kept before one writes more.
    store = shelf.ranks.agree(partial(DiskStore, folder, facts, len(rows)))
    needed = need.kept * len(store.missing()) // len(rows)
    try:
        shelf.ranks.agree(partial(require_disk, shelf.cache, needed, shelf.beside))
    except OutputError:
        if shelf.ranks.writes:
            with suppress(OSError):  # it holds what an earlier run kept
                folder.rmdir()
        raise
    return store


def _fill(
    store: Store,
    loaded: LoadedModel,
    rows: Rows,
    survey: Survey,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> None:
    """Compute the rows that the store lacks; several processes take batches in turn."""
    left = store.missing()
    done = len(rows) - len(left)
    parts = [
        [left[i] for i in part] for part in rows.subset(left).in_order(batch_rows(rows, survey))
    ]
    try:
        for chosen, is_own in ranks.turns(parts):
            make = partial(_rows, loaded, rows, survey)
            made = ranks.agree(partial(by_halves, chosen, make, in_step=ranks.in_step))
            own = {index: row for part in made for index, row in part.items()} if is_own else {}
            for found in ranks.gather(own):
                done += len(found)
                if ranks.writes:
                    store.add(found)
            progress(Event(stage="teacher", done=done, total=len(rows), unit="inputs"))
    finally:  # even after an error, what is done need not be done again
        store.close()


def batch_rows(rows: Rows, survey: Survey) -> int:
    """Choose how many rows are computed at a time, so that no output is too large for memory."""
    longest = max(map(rows.length, range(len(rows))))
    widest = max((output.size for output in survey.matched), default=1)
    # Rows without a mask have no length, but outputs as long as others' (`Survey.cells`).
    return max(1, min(BATCH, CELLS // max(1, longest * widest, survey.cells)))


@torch.no_grad()
def _compute(
    loaded: LoadedModel, rows: Rows, survey: Survey, chosen: Sequence[int]
) -> dict[str, Tensor]:
    batch = rows.batch(chosen)
    found = run(loaded, batch, one_row=survey.one_row)
    values = {}
    for output in survey.matched:
        outputs = found.pop(output.name)
        # A shortened distribution is not finite where the whole one is not.
        outputs = _shorten(outputs, output.kept) if output.kept else outputs.float()
        aligned, _ = output.aligned(outputs, rows.mask(chosen))
        if bool((aligned.isnan() | (aligned == torch.inf)).any()):
            raise InputError(
                f"output {output.name} of the tuned model is not finite for one of the inputs"
                f" {', '.join(map(str, sorted(chosen)[:3]))}, ...",
                fix="check the tuned model, or leave that output out with --outputs",
            )
        values[output.name] = outputs.cpu()
    return values


def _shorten(logits: Tensor, k: int) -> Tensor:
    """Shorten some positions at a time: `shorten` takes several times the memory of its input."""
    flat = logits.reshape(-1, logits.shape[-1])
    parts = [shorten(part, k) for part in torch.split(flat, max(1, CHUNK // flat.shape[-1]))]
    return torch.cat(parts).view(*logits.shape[:-1], -1)


def _rows(
    loaded: LoadedModel, rows: Rows, survey: Survey, chosen: Sequence[int]
) -> dict[int, Mapping[str, Tensor]]:
    """Compute a batch, and take its outputs apart, without the positions that padding added."""
    values = _compute(loaded, rows, survey, chosen)
    return {
        index: {
            output.name: _cut(output, values[output.name][place], rows.length(index), rows)
            for output in survey.matched
        }
        for place, index in enumerate(chosen)
    }


def _cut(output: Output, values: Tensor, length: int, rows: Rows) -> Tensor:
    """Cut from one row's output (...) the positions that its batch's padding added."""
    for axis in output.token_axes if rows.pad else ():
        values = values.narrow(axis - 1, 0, length)
    return values.clone()
