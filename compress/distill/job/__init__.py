"""Settle everything before the first step: what changed, what carries it, which method.

`prepare` opens both models and returns a `Job`; what trains, measures and writes reads it.
"""

from __future__ import annotations

from kilodelta.compress.distill.job.job import Job as Job
from kilodelta.compress.distill.job.job import as_dtype as as_dtype
from kilodelta.compress.distill.job.preparation import prepare as prepare

__all__ = ["Job", "as_dtype", "prepare"]
