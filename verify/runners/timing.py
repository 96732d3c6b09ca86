"""Ours and an opponent's time, taken in turns so that what disturbs one disturbs the other."""

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
    """The best of several turns of each, in seconds, taken in rotation after some to warm up.

    Args:
        wait: until a device has done all that it was asked; before and after every run.
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
