"""What the doctor finds: one thing on this machine, whether it works, and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass

from kilodelta.export.tensorrt.cuda import Gpu

OK, MISSING, BROKEN, CONFLICT = "ok", "missing", "broken", "conflict"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing on this machine: what it is, whether it works, and how to mend it."""

    topic: str
    status: str
    value: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """The driver's newest CUDA as (major, minor), and its GPUs; empty without a driver."""

    version: tuple[int, int] = (0, 0)
    gpus: tuple[Gpu, ...] = ()


def missing(topic: str, fix: str) -> Finding:
    """Something that is not installed."""
    return Finding(topic=topic, status=MISSING, value="not installed", fix=fix)
