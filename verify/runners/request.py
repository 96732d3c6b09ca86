"""Repeat one inference on inputs that already lie on the device, and measure latency.

Latency is the time from enqueueing one inference to its end; throughput is that of many, enqueued
one after another and awaited once. Importing this needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from kilodelta.verify.parity.result import Json

WARM_UP, TIMES = 10, 200
LONGEST_SECONDS = 2.0
"""Limit of one round; slow inferences are timed fewer times, but at least twice."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One batch on a device.

    Attributes:
        start: enqueues one inference.
        wait: blocks until all that were enqueued have ended.
        capture: returns a function that enqueues the same as a CUDA graph; it raises the runtime's
            own error if the inference cannot be captured. None if the runtime has no graphs.
    """

    start: Callable[[], object]
    wait: Callable[[], object]
    capture: Callable[[], Callable[[], object]] | None = None


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds per inference (median and 99th percentile), and rows of the batch per second."""

    median: float
    p99: float
    rows_a_second: float

    def __str__(self) -> str:
        median, p99 = self.median * 1e3, self.p99 * 1e3
        return f"median {median:.3f} ms, p99 {p99:.3f} ms, {self.rows_a_second:,.0f} rows/s"

    def to_json(self) -> Json:
        """Return the numbers by name."""
        return {
            "median_s": self.median,
            "p99_s": self.p99,
            "rows_a_second": self.rows_a_second,
        }


def latency(
    start: Callable[[], object], wait: Callable[[], object], rows: int, *, times: int = TIMES
) -> Latency:
    """Measure an inference after warming it up.

    Args:
        start: enqueues one inference.
        wait: blocks until all that were enqueued have ended.
        rows: rows of the batch, for the throughput.
        times: single inferences to time, unless `LONGEST_SECONDS` end the round before.
    """
    for _ in range(WARM_UP):
        start()
    wait()
    seconds: list[float] = []
    end = perf_counter() + LONGEST_SECONDS
    while len(seconds) < 2 or (len(seconds) < times and perf_counter() < end):
        began = perf_counter()
        start()
        wait()
        seconds.append(perf_counter() - began)
    began = perf_counter()
    for _ in seconds:
        start()
    wait()
    each = (perf_counter() - began) / len(seconds)
    median, p99 = (float(value) for value in np.percentile(seconds, (50, 99)))
    return Latency(median=median, p99=p99, rows_a_second=rows / each)
