"""Rows that say how long an artefact takes at the corners of its profile, with and without a CUDA
graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import numpy as np
import torch

from kilodelta.errors import KiloDeltaError
from kilodelta.export.tensorrt.cuda import CudaError
from kilodelta.verify.gpu.measure import captured, wait
from kilodelta.verify.gpu.part import MEASURED, Row, guarded
from kilodelta.verify.parity.cases import Case
from kilodelta.verify.runners.request import Latency, Request, latency
from kilodelta.verify.runners.runner import Batch, one_line
from kilodelta.verify.runners.torch_runner import as_precision

Ask: TypeAlias = Callable[[Batch], AbstractContextManager[Request]]


def latencies(what: str, ask: Ask, corners: Sequence[Case]) -> Iterator[Row]:
    """A row for each corner."""
    for case in corners:
        shape = "x".join(map(str, case.shape))
        name = f"{what}, {case.name} {shape}"
        yield from guarded(name, _corner(name, ask, case))


def _corner(name: str, ask: Ask, case: Case) -> Iterator[Row]:
    with ask(case.batch) as request:
        rows = case.shape[0]
        plain = latency(request.start, request.wait, rows)
        graph = _graph(request, rows)
    found, numbers = str(plain), plain.to_json()
    if isinstance(graph, Latency):
        found += f"; in a CUDA graph {graph}"
        numbers["graph"] = graph.to_json()
    elif graph:
        found += f"; no CUDA graph: {graph}"
    yield Row(what=name, found=found, status=MEASURED, numbers=numbers)


def _graph(request: Request, rows: int) -> Latency | str:
    """The same in a CUDA graph, or why not; empty where the runtime has none."""
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
    """A module that is in `precision` on the device already, asked for a batch."""
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
