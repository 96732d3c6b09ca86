"""CUDA graphs by the driver itself, of work that a CUDA `Stream` is given."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from kilodelta.export.tensorrt.cuda import Driver, Stream

_THREAD_LOCAL = 1  # CUstreamCaptureMode: what other threads do meanwhile is no matter


class Graph:
    """What `work` sets off on a stream, captured once and launched as a whole.

    Raises:
        CudaError: the work cannot be captured.
    """

    def __init__(self, driver: Driver, stream: Stream, work: Callable[[], object]) -> None:
        self._driver, self._stream = driver, ctypes.c_void_p(stream.address)
        graph, self._ready = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        try:
            work()
        finally:
            driver.call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        none = ctypes.c_ulonglong(0)
        try:
            driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self._ready), graph, none)
        finally:
            driver.call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Set the work off on its stream."""
        self._driver.call("cuGraphLaunch", self._ready, self._stream)

    def close(self) -> None:
        """Give the graph back; it must not be running."""
        self._driver.call("cuGraphExecDestroy", self._ready)
