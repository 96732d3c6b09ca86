"""Independent pieces of work on all cores, the heaviest first; one failure ends all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from kilodelta.progress import Meter, StoppedError

T = TypeVar("T")
R = TypeVar("R")


def run(
    function: Callable[[T], R],
    items: Sequence[T],
    meter: Meter,
    *,
    weight: Callable[[T], int],
    threads: int | None = None,
) -> list[R]:
    """`function` of every item, in the items' order.

    The functions report to `meter`, which is how an error in one of them, or Ctrl-C here, stops
    the others within one report.

    Raises:
        Exception: the first one that an item raised.
    """
    meter.expect(len(items))

    def work(item: T) -> R:
        found = function(item)
        meter.finish()
        return found

    if threads == 1:  # no thread is started, which milliseconds of work would feel
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        order = sorted(range(len(items)), key=lambda i: -weight(items[i]))
        jobs = {i: pool.submit(work, items[i]) for i in order}
        try:
            done, _ = wait(jobs.values(), return_when=FIRST_EXCEPTION)
            _raise_first(done)
        except BaseException:
            meter.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [jobs[i].result() for i in range(len(items))]


def _raise_first(done: set[Future[R]]) -> None:
    errors = [job.exception() for job in done]
    for error in errors:
        if error is not None and not isinstance(error, StoppedError):
            raise error
