"""Measuring on a GPU: times taken in rotation, and the ratio of ours to a named opponent's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from kilodelta.verify.gpu.part import MEASURED, Row
from kilodelta.verify.parity.result import Json
from kilodelta.verify.runners import timing
from kilodelta.verify.runners.runner import UnavailableError

Run: TypeAlias = Callable[[], object]

TURNS = 10


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a ratio has to reach: at least so many times faster, or at most so much of theirs."""

    sense: Literal[">=", "<="]
    bound: float

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"

    def holds(self, ratio: float) -> bool:
        return ratio >= self.bound if self.sense == ">=" else ratio <= self.bound


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What we and an opponent took in one run, in seconds or bytes.

    Where something is wanted with `<=`, the ratio is ours over the opponent's; else it says how
    many times less we took.
    """

    what: str
    against: str
    ours: float
    theirs: float
    unit: Literal["s", "B"] = "s"
    wanted: Wanted | None = None

    @property
    def ratio(self) -> float:
        costs = self.wanted is not None and self.wanted.sense == "<="
        return self.ours / self.theirs if costs else self.theirs / self.ours

    @property
    def verdict(self) -> str:
        """Whether the ratio is the one wanted; empty where none is."""
        if self.wanted is None:
            return ""
        return "holds" if self.wanted.holds(self.ratio) else "MISSED"

    def row(self) -> Row:
        factor, unit = (1e3, "ms") if self.unit == "s" else (2.0**-20, "MiB")
        wanted = f", wanted {self.wanted}: {self.verdict}" if self.wanted else ""
        pair = f"{self.ours * factor:.3f} against {self.theirs * factor:.3f} {unit}"
        return Row(
            what=f"{self.what}: {self.against}",
            found=f"{self.ratio:.2f}x{wanted} ({pair})",
            status=MEASURED,
            numbers=self.to_json(),
        )

    def to_json(self) -> Json:
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
    """`timing.side_by_side` on a device, after two turns to warm up: by then kernels are compiled,
    and torch's allocator holds what every run allocates."""
    return timing.side_by_side(runs, repeats=turns, warm=2, wait=lambda: wait(device))


def wait(device: torch.device) -> None:
    """Until a device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(run: Run, device: torch.device) -> Run:
    """The same work as one CUDA graph: no Python and no launch of a kernel is in its time.

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
    """The most bytes that torch has on a CUDA device in a run, above what it had before."""
    gc.collect()
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before
