"""Call the CUDA driver: as much of it as finding a GPU and running an engine on it needs.

It is called through ctypes, so neither torch nor a toolkit is needed: `libcuda` comes with the
driver itself. Names and numbers are those of NVIDIA's `cuda.h`.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class CudaError(Exception):
    """The driver is missing or a call failed; the text says which and why."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device: its name, compute capability as (major, minor) and memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int

    @property
    def sm(self) -> str:
        """The compute capability as compilers write it, such as "sm89"."""
        return f"sm{self.capability[0]}{self.capability[1]}"


class Driver:
    """An initialised driver.

    Args:
        library: `libcuda` as ctypes loads it.

    Raises:
        CudaError: it does not start, for want of a device or a matching kernel module.
    """

    def __init__(self, library: Any) -> None:
        self._cuda = library
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self.call("cuInit", 0)

    def call(self, function: str, *arguments: Any) -> None:
        """Call a driver function; anything but CUDA_SUCCESS raises `CudaError`."""
        code = getattr(self._cuda, function)(*arguments)
        if code != 0:
            raise CudaError(f"{function} failed: {self._explain(code)}")

    def version(self) -> tuple[int, int]:
        """Return the newest CUDA that the driver supports, as (major, minor)."""
        value = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(value))
        return value.value // 1000, value.value % 1000 // 10

    def gpus(self) -> tuple[Gpu, ...]:
        """Return every device that is visible to this process."""
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        return tuple(self._gpu(index) for index in range(count.value))

    def handle(self, index: int) -> ctypes.c_int:
        """Return the driver's handle of a device."""
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), index)
        return device

    def use(self, index: int) -> None:
        """Make a device's primary context current, the one that TensorRT and torch use.

        It stays retained while the process lives: an engine loaded in it must not lose it.
        """
        if index not in self._contexts:
            context = ctypes.c_void_p()
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.handle(index))
            self._contexts[index] = context
        self.call("cuCtxSetCurrent", self._contexts[index])

    def _gpu(self, index: int) -> Gpu:
        device, name, memory = self.handle(index), ctypes.create_string_buffer(256), _size()
        self.call("cuDeviceGetName", name, 256, device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        major = self._attribute(_CAPABILITY_MAJOR, device)
        minor = self._attribute(_CAPABILITY_MINOR, device)
        return Gpu(
            name=name.value.decode("utf-8", "replace"),
            capability=(major, minor),
            memory_bytes=memory.value,
        )

    def _attribute(self, attribute: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value

    def _explain(self, code: int) -> str:
        text = ctypes.c_char_p()
        if self._cuda.cuGetErrorString(code, ctypes.byref(text)) != 0 or text.value is None:
            return f"CUresult {code}"
        return f"{text.value.decode('utf-8', 'replace')} (CUresult {code})"


class CudaStream:
    """A stream in a device's primary context, and the buffers that live as long as it does."""

    def __init__(self, driver: Driver, index: int = 0) -> None:
        self._driver, self._stream = driver, ctypes.c_void_p()
        self._buffers: list[ctypes.c_uint64] = []
        driver.use(index)
        driver.call("cuStreamCreate", ctypes.byref(self._stream), 0)

    def __enter__(self) -> CudaStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()
        for buffer in self._buffers:
            self._driver.call("cuMemFree_v2", buffer)
        self._driver.call("cuStreamDestroy_v2", self._stream)

    @property
    def address(self) -> int:
        """The stream as the integer that other libraries take."""
        return self._stream.value or 0

    def wait(self) -> None:
        """Wait until everything that was enqueued on the stream has ended."""
        self._driver.call("cuStreamSynchronize", self._stream)

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory and return its address; no bytes get an address as well."""
        buffer = ctypes.c_uint64()
        self._driver.call("cuMemAlloc_v2", ctypes.byref(buffer), _size(max(nbytes, 1)))
        self._buffers.append(buffer)
        return buffer.value

    def upload(self, array: NDArray[Any]) -> int:
        """Copy a C-contiguous array to the device and return its address there."""
        address = self.allocate(array.nbytes)
        if array.nbytes:
            self._driver.call(
                "cuMemcpyHtoD_v2",
                ctypes.c_uint64(address),
                ctypes.c_void_p(array.ctypes.data),
                _size(array.nbytes),
            )
        return address

    def download(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Wait for the stream, then copy device memory into a new array of this shape and dtype."""
        array = np.empty(shape, dtype=dtype)
        self.wait()
        if array.nbytes:
            self._driver.call(
                "cuMemcpyDtoH_v2",
                ctypes.c_void_p(array.ctypes.data),
                ctypes.c_uint64(address),
                _size(array.nbytes),
            )
        return array


@functools.cache
def driver() -> Driver:
    """Return the one driver of this process.

    Raises:
        CudaError: no driver is installed, or it does not start.
    """
    return Driver(_load())


def present() -> str | None:
    """Return the compute capability of the first GPU, such as `sm89`; None without one."""
    try:
        gpus = driver().gpus()
    except CudaError:
        return None
    return gpus[0].sm if gpus else None


def _size(value: int = 0) -> ctypes.c_size_t:
    return ctypes.c_size_t(value)


def _load() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        raise CudaError(f"no NVIDIA driver: {_LIBRARY} cannot be loaded") from None
