"""Inference asked for again and again on inputs that lie on the device, and how long it takes.

Latency is from the call that sets one inference off to its end; throughput is that of a row of
inferences, set off one after another and awaited once. Devices use this without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from kilodelta.verify.parity.result import Json

WARM_UP, TIMES = 10, 200
LONGEST_SECONDS = 2.0
"""Of one round; slow inferences are timed fewer times, but at least twice."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One batch on a device: `start` sets an inference off, `wait` is for all that were.

    `capture` gives the same as a CUDA graph, or is None where the runtime offers none. It raises
    whatever the runtime does where the inference cannot be captured.
    """

    start: Callable[[], object]
    wait: Callable[[], object]
    capture: Callable[[], Callable[[], object]] | None = None


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds of one inference, and rows of the batch a second."""

    median: float
    p99: float
    rows_a_second: float

    def __str__(self) -> str:
        median, p99 = self.median * 1e3, self.p99 * 1e3
        return f"median {median:.3f} ms, p99 {p99:.3f} ms, {self.rows_a_second:,.0f} rows/s"

    def to_json(self) -> Json:
        return {
            "median_s": self.median,
            "p99_s": self.p99,
            "rows_a_second": self.rows_a_second,
        }


def latency(
    start: Callable[[], object], wait: Callable[[], object], rows: int, *, times: int = TIMES
) -> Latency:
    """Time a warmed-up inference of so many rows."""
    for _ in range(WARM_UP):
        start()
    wait()
    found: list[float] = []
    end = perf_counter() + LONGEST_SECONDS
    while len(found) < 2 or (len(found) < times and perf_counter() < end):
        began = perf_counter()
        start()
        wait()
        found.append(perf_counter() - began)
    began = perf_counter()
    for _ in found:
        start()
    wait()
    each = (perf_counter() - began) / len(found)
    median, p99 = (float(value) for value in np.percentile(found, (50, 99)))
    return Latency(median=median, p99=p99, rows_a_second=rows / each)
