"""Measure on a GPU: times taken in rotation, and the ratio of ours to another implementation's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from kilodelta.verify.gpu.part import MEASURED, PartRow
from kilodelta.verify.parity.result import Json
from kilodelta.verify.runners import timing
from kilodelta.verify.runners.runner import UnavailableError

Run: TypeAlias = Callable[[], object]

TURNS = 10


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """What a ratio should be: `>=` so many times as fast, or `<=` so much of the other's cost."""

    sense: Literal[">=", "<="]
    bound: float

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"

    def holds(self, ratio: float) -> bool:
        """Return whether a ratio is as wanted."""
        return ratio >= self.bound if self.sense == ">=" else ratio <= self.bound


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What we and another implementation took in one run.

    Attributes:
        what: what was done.
        against: the other implementation.
        ours: seconds or bytes.
        theirs: likewise.
        unit: "s" or "B".
        wanted: what the ratio should be; None if nothing is wanted.
    """

    what: str
    against: str
    ours: float
    theirs: float
    unit: Literal["s", "B"] = "s"
    wanted: Threshold | None = None

    @property
    def ratio(self) -> float:
        """Ours over theirs if `<=` is wanted; else theirs over ours."""
        costs = self.wanted is not None and self.wanted.sense == "<="
        return self.ours / self.theirs if costs else self.theirs / self.ours

    @property
    def verdict(self) -> str:
        """Whether the ratio is as wanted; empty if nothing is wanted."""
        if self.wanted is None:
            return ""
        return "holds" if self.wanted.holds(self.ratio) else "MISSED"

    def row(self) -> PartRow:
        """Return the measurement as a row of the report."""
        factor, unit = (1e3, "ms") if self.unit == "s" else (2.0**-20, "MiB")
        wanted = f", wanted {self.wanted}: {self.verdict}" if self.wanted else ""
        pair = f"{self.ours * factor:.3f} against {self.theirs * factor:.3f} {unit}"
        return PartRow(
            what=f"{self.what}: {self.against}",
            found=f"{self.ratio:.2f}x{wanted} ({pair})",
            status=MEASURED,
            numbers=self.to_json(),
        )

    def to_json(self) -> Json:
        """Return everything, fit for strict JSON."""
        return {
            "what": self.what,
            "against": self.against,
            "kilodelta": self.ours,
            "opponent": self.theirs,
            "unit": self.unit,
            "ratio": self.ratio,
            "wanted": str(self.wanted) if self.wanted else None,
            "holds": self.verdict == "holds" if self.wanted else None,
        }


def side_by_side(
    runs: Mapping[str, Run], device: torch.device, turns: int = TURNS
) -> dict[str, float]:
    """Return the best time of each run in seconds, taken in rotation.

    Two turns warm up: by then kernels are compiled, and torch's allocator holds all that a run
    allocates.

    Args:
        runs: what to time, by name.
        device: waited for before and after each run.
        turns: timed turns.
    """
    return timing.side_by_side(runs, repeats=turns, warm=2, wait=lambda: wait(device))


def wait(device: torch.device) -> None:
    """Block until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(run: Run, device: torch.device) -> Run:
    """Capture work as one CUDA graph, so that neither Python nor kernel launches count.

    Raises:
        UnavailableError: the device is no GPU.
    """
    if device.type != "cuda":
        raise UnavailableError("CUDA graphs need CUDA", fix="measure on a GPU")
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak(run: Run, device: torch.device) -> int:
    """Return the peak of torch's bytes on a CUDA device in a run, above what it held before."""
    gc.collect()
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before
