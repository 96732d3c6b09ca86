"""Run independent pieces of work on all cores, the heaviest first; one failure ends all."""

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
    count: Callable[[T], int] = lambda _: 1,
) -> list[R]:
    """Call a function with every item, in threads; return the results in the items' order.

    Args:
        function: must report to `meter` often: that is how an error in one call, or Ctrl-C in this
            thread, stops the others within one report.
        items: what it is called with.
        meter: counts finished items here, and the work in between.
        weight: how much work an item is, in any unit; the heaviest items are begun first.
        threads: how many; one for each core by default. With 1, none is started.
        count: how many finished items one counts as.

    Raises:
        Exception: the first one that a call raised.

    Example:
        >>> from kilodelta.progress import silent
        >>> run(lambda n: n * n, [1, 2, 3], Meter("square", 3, "numbers", silent), weight=abs)
        [1, 4, 9]
    """
    meter.expect(sum(map(count, items)))

    def work(item: T) -> R:
        result = function(item)
        for _ in range(count(item)):
            meter.finish()
        return result

    if threads == 1:  # starting one would be felt in work of milliseconds
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
        # calls that were stopped because another one failed say nothing about the cause
        if error is not None and not isinstance(error, StoppedError):
            raise error
