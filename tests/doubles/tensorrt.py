"""The CUDA driver and TensorRT as far as the runner of engines calls them, on host memory.

Both check every call: an address that the driver did not give, a shape outside the profile and a
stream that was not created are refused, as the real ones refuse them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest

from kilodelta.export.tensorrt import cuda
from kilodelta.verify.runners import tensorrt_runner

Machine: TypeAlias = Callable[..., "FakeCuda"]
"""Puts a driver and a TensorRT with the given engine in place; returns the driver."""


class FakeCuda:
    """`libcuda` with host memory for device memory; it refuses addresses it did not give."""

    def __init__(self, capability: tuple[int, int] = (8, 6), devices: int = 1) -> None:
        self.capability, self.devices = capability, devices
        self.memory: dict[int, Any] = {}
        self.log: list[str] = []

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0 if self.devices else 100

    def cuGetErrorString(self, code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = {100: b"no CUDA-capable device is detected"}.get(code)
        return 0

    def cuDriverGetVersion(self, value: Any) -> int:  # noqa: N802
        value._obj.value = 13020
        return 0

    def cuDeviceGetCount(self, value: Any) -> int:  # noqa: N802
        value._obj.value = self.devices
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = b"Fake RTX"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:  # noqa: N802
        memory._obj.value = 12 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = self.capability[attribute - 75]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        self.log.append("retain")
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:  # noqa: N802
        stream._obj.value = 77
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        self.log.append("synchronize")
        return 0

    def cuStreamDestroy_v2(self, stream: Any) -> int:  # noqa: N802
        self.log.append("destroy")
        return 0

    def cuMemAlloc_v2(self, address: Any, nbytes: Any) -> int:  # noqa: N802
        if nbytes.value == 0:
            return 1
        block = ctypes.create_string_buffer(nbytes.value)
        address._obj.value = ctypes.addressof(block)
        self.memory[ctypes.addressof(block)] = block
        return 0

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        del self.memory[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, to: Any, source: Any, nbytes: Any) -> int:  # noqa: N802
        ctypes.memmove(self.memory[to.value], source.value, nbytes.value)
        return 0

    def cuMemcpyDtoH_v2(self, to: Any, source: Any, nbytes: Any) -> int:  # noqa: N802
        self.log.append("download")
        ctypes.memmove(to.value, self.memory[source.value], nbytes.value)
        return 0


def named(name: str) -> Any:
    """A member of one of TensorRT's enumerations, as far as its name is read."""
    return SimpleNamespace(name=name)


class FakeEngine:
    """y = 2 x in `kind`, x of (1..4, 3) in the first profile and (5..8, 3) in the second."""

    num_io_tensors = 2
    num_optimization_profiles = 2

    def __init__(self, kind: str, dtype: Any) -> None:
        self.kind, self.dtype = kind, dtype

    def get_tensor_name(self, index: int) -> str:
        return ("y", "x")[index]

    def get_tensor_mode(self, name: str) -> Any:
        return named({"x": "INPUT", "y": "OUTPUT"}[name])

    def get_tensor_dtype(self, name: str) -> Any:
        return named(self.kind)

    def get_tensor_location(self, name: str) -> Any:
        return named("DEVICE")

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        assert name == "x"
        return [[[1, 3], [2, 3], [4, 3]], [[5, 3], [6, 3], [8, 3]]][index]

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


class FakeContext:
    """Computes on the addresses that it was given."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shape: tuple[int, ...] = ()
        self.at: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return stream == 77

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shape = tuple(shape)
        return low[0] <= shape[0] <= high[0]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.at[name] = address
        return address != 0

    def infer_shapes(self) -> list[str]:
        return [] if self.shape else ["x"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def execute_async_v3(self, stream: int) -> bool:
        count = int(np.prod(self.shape))
        kind = np.ctypeslib.as_ctypes_type(np.dtype(self.engine.dtype))
        x, y = ((kind * count).from_address(self.at[name]) for name in ("x", "y"))
        if self.engine.kind == "BF16":  # doubling adds one to the exponent
            y[:] = [word + 0x80 if word else 0 for word in x]
        else:
            y[:] = [2 * value for value in x]
        return stream == 77


class FakeTensorrt:
    """The package, its runtime returning one engine whatever it reads."""

    class ILogger:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

    def __init__(self, engine: FakeEngine | None) -> None:
        self.engine = engine

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda data: self.engine)


@contextmanager
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Yield a function that puts a driver and a TensorRT in place of the real ones."""

    def build(engine: FakeEngine | None, **options: Any) -> FakeCuda:
        library = FakeCuda(**options)
        monkeypatch.setattr(cuda, "_load", lambda: library)
        monkeypatch.setattr(tensorrt_runner, "require", lambda *_, **__: FakeTensorrt(engine))
        cuda.driver.cache_clear()
        return library

    yield build
    cuda.driver.cache_clear()
