"""Time two or more ways to do the same, in rotation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter


def _nothing() -> None: ...


def side_by_side(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warm: int = 1,
    wait: Callable[[], object] = _nothing,
) -> dict[str, float]:
    """Return the best time of each run in seconds.

    The runs take turns, so that what disturbs the machine disturbs all of them.

    Args:
        runs: what to time, by name.
        repeats: timed turns.
        warm: turns before them that are not timed.
        wait: blocks until a device has done all that it was given; called before and after a run.

    Example:
        >>> sorted(side_by_side({"sum": lambda: sum(range(9)), "max": lambda: max(range(9))}))
        ['max', 'sum']
    """
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(warm + repeats):
        for name, run in runs.items():
            wait()
            began = perf_counter()
            run()
            wait()
            if turn >= warm:
                best[name] = min(best[name], perf_counter() - began)
    return best
