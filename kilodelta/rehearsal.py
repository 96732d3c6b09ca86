"""Go through a command's checks and stop before its first write.

A function that works long or writes files calls `begin_work` once everything is checked. Inside
`dry_run` that ends the function; elsewhere it does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(kw_only=True)
class Rehearsal:
    """What a function would have done; empty where it never came to its work.

    Attributes:
        writes: the files and folders that it would write.
        facts: what it found out by then, by a short name each.
        is_reached: whether all checks passed.
    """

    writes: tuple[Path, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    is_reached: bool = False

    def to_json(self) -> dict[str, object]:
        """Return the fields as JSON holds them."""
        return {"writes": [str(path) for path in self.writes], "facts": dict(self.facts)}


class _ReachedError(BaseException):
    """Ends a rehearsed function. No `Exception`: handlers of failures let it pass."""


_current: ContextVar[Rehearsal | None] = ContextVar("rehearsal", default=None)


@contextmanager
def dry_run() -> Iterator[Rehearsal]:
    """Let a function of kilodelta check everything, and stop before it works or writes.

    The block ends where the function would begin to work. Errors of the checks are raised as ever.
    Models are read, and digests remembered in the cache, but no output is touched.

    Example:
        >>> import kilodelta
        >>> golden = "tests/golden/0.1.0"
        >>> with kilodelta.dry_run() as rehearsed:
        ...     file = f"{golden}/nola-8.kd"
        ...     kilodelta.merge(f"{golden}/base.safetensors", file, "out.safetensors")
        >>> rehearsed.facts["targets"], Path("out.safetensors").exists()
        ('4 tensors, by nola', False)
    """
    rehearsal = Rehearsal()
    token = _current.set(rehearsal)
    try:
        yield rehearsal
    except _ReachedError:
        pass
    finally:
        _current.reset(token)


def is_dry_run() -> bool:
    """Return whether a rehearsal is under way, for checks that else are made under a lock."""
    return _current.get() is not None


def begin_work(*writes: str | Path, **facts: object) -> None:
    """Mark the end of a function's checks: inside `dry_run`, the function ends here.

    Args:
        writes: the files and folders that the function writes from here on.
        facts: what a user wants to know before, by name.
    """
    rehearsal = _current.get()
    if rehearsal is None:
        return
    rehearsal.writes = tuple(Path(path) for path in writes)
    rehearsal.facts = {name: str(value) for name, value in facts.items()}
    rehearsal.is_reached = True
    raise _ReachedError
