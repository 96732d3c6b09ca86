"""Let one module be the base and the tuned model in turn, so that memory holds one of the two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kilodelta.compress.distill.changes.compare import Change
from kilodelta.compress.distill.pair import Pair
from kilodelta.compress.distill.processes import shards
from kilodelta.models import LoadedModel
from kilodelta.models.weights import MappedCheckpoint, fill, place


@contextmanager
def as_tuned(pair: Pair, changes: Sequence[Change]) -> Iterator[LoadedModel]:
    """Yield the tuned model, and give its memory back when the block ends.

    Where both models' files hold tensors of the same names and shapes, the student's module takes
    the changed tensors from the tuned files and afterwards the base's again. Otherwise (a new
    head, other names) a second module was opened; its tensors are dropped at the end.

    Args:
        pair: both models, opened to compute; no delta is attached.
        changes: every tensor that differs.
    """
    student, teacher = pair.student, pair.teacher
    assert student is not None  # the caller has inputs, so both were opened
    assert teacher is not None
    new = {change.name for change in changes if change.is_new}  # in the base's place already
    if teacher.module is not student.module:
        if student.mapped is not None:  # nobody computes with the base meanwhile
            student.mapped.release(name for name in pair.base.names if name not in new)
        yield teacher
        if shards.is_sharded(teacher.module):
            shards.free(teacher.module)
        else:
            teacher.module.to("meta")
        return
    differing = {change.name for change in changes}
    names = {
        name: pair.names[name]
        for name in pair.base.names
        if name in pair.names
        # Values that are equal up to rounding to the base's type are no change, and yet other
        # values: the teacher computes with what its own files say.
        and (name in differing or pair.base.info(name).dtype != pair.tuned.info(name).dtype)
    }
    if student.mapped is None:
        try:
            fill(student.module, pair.tuned, names)
            yield teacher
        finally:
            fill(student.module, pair.base, names)
        return
    try:
        place(student.module, pair.tuned, names, MappedCheckpoint(pair.tuned))
        student.mapped.release(name for name in names if name not in new)
        yield teacher
    finally:  # the tuned file is unmapped as the last tensor over it goes
        place(student.module, pair.base, names, student.mapped)
