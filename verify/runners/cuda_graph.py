"""CUDA graphs by the driver API: capture the work given to a stream once, launch it as a whole."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from kilodelta.export.tensorrt.cuda import CudaStream, Driver

# CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: calls by other threads do not invalidate the capture.
_THREAD_LOCAL = 1


class Graph:
    """A captured graph, ready to launch on the stream that it was captured from.

    Args:
        driver: the CUDA driver.
        stream: the stream that `work` enqueues on.
        work: enqueues everything that a launch is to repeat; it must not wait for the stream.

    Raises:
        CudaError: the work cannot be captured.
    """

    def __init__(self, driver: Driver, stream: CudaStream, work: Callable[[], object]) -> None:
        self._driver, self._stream = driver, ctypes.c_void_p(stream.address)
        graph, self._ready = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuStreamBeginCapture_v2", self._stream, _THREAD_LOCAL)
        try:
            work()
        finally:  # a stream left capturing refuses every later call
            driver.call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        flags = ctypes.c_ulonglong(0)
        try:
            driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self._ready), graph, flags)
        finally:
            driver.call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Enqueue the whole graph on its stream."""
        self._driver.call("cuGraphLaunch", self._ready, self._stream)

    def close(self) -> None:
        """Free the graph; no launch of it may be running."""
        self._driver.call("cuGraphExecDestroy", self._ready)
