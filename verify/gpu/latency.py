"""Measure how long an artefact takes at each case, with and without a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import numpy as np
import torch

from kilodelta.errors import KiloDeltaError, one_line
from kilodelta.export.tensorrt.cuda import CudaError
from kilodelta.verify.gpu.measure import captured, wait
from kilodelta.verify.gpu.part import MEASURED, PartRow, guarded
from kilodelta.verify.parity.cases import Case
from kilodelta.verify.runners.request import Latency, Request, latency
from kilodelta.verify.runners.runner import Batch
from kilodelta.verify.runners.torch_runner import as_precision

Ask: TypeAlias = Callable[[Batch], AbstractContextManager[Request]]


def latencies(what: str, ask: Ask, cases: Sequence[Case]) -> Iterator[PartRow]:
    """Yield one row per case.

    Args:
        what: the artefact and its runner, for the report.
        ask: binds a batch on the device.
        cases: the inputs; those that differ by padding alone take as long, so one of them is timed.
    """
    timed: dict[tuple[int, ...], Case] = {}
    for case in cases:
        timed.setdefault(case.shape, case)
    for case in timed.values():
        shape = "x".join(map(str, case.shape))
        name = f"{what}, {case.name} {shape}"
        yield from guarded(name, _corner(name, ask, case))


def _corner(name: str, ask: Ask, case: Case) -> Iterator[PartRow]:
    with ask(case.batch) as request:
        rows = case.shape[0]
        plain = latency(request.start, request.wait, rows)
        graph = _graph(request, rows)
    text, numbers = str(plain), plain.to_json()
    if isinstance(graph, Latency):
        text += f"; in a CUDA graph {graph}"
        numbers["graph"] = graph.to_json()
    elif graph:
        text += f"; no CUDA graph: {graph}"
    yield PartRow(what=name, found=text, status=MEASURED, numbers=numbers)


def _graph(request: Request, rows: int) -> Latency | str:
    """Time the same in a CUDA graph, or return why not; empty if the runtime has no graphs."""
    if request.capture is None:
        return ""
    try:
        launch = request.capture()
    except (RuntimeError, CudaError, KiloDeltaError) as error:  # torch's, the driver's, TensorRT's
        return one_line(error)
    return latency(launch, request.wait, rows)


@contextmanager
def on_torch(
    module: torch.nn.Module, batch: Batch, *, precision: str, device: torch.device
) -> Iterator[Request]:
    """Bind a batch for a module that is on the device already.

    Args:
        module: in `precision` on `device`.
        batch: the inputs by name.
        precision: such as `float16`; floating inputs are cast to it.
        device: where it computes.
    """
    dtype: torch.dtype = getattr(torch, precision)
    tensors = {name: torch.from_numpy(np.array(array)).to(device) for name, array in batch.items()}
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    def start() -> None:
        module(**inputs)

    graphs = device.type == "cuda"
    with as_precision(precision, device.type):
        yield Request(
            start=start,
            wait=lambda: wait(device),
            capture=(lambda: captured(start, device)) if graphs else None,
        )
