"""Run a TensorRT engine; `tensorrt` and `tensorrt_rtx` have one API here.

An engine needs the GPU that it was built for. Memory and streams come from the CUDA driver
(`kilodelta.export.tensorrt.cuda`), so a torch without CUDA in the same environment does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import KiloDeltaError, MissingPackageError, ProofError, require
from kilodelta.export.tensorrt.cuda import CudaError, CudaStream, Gpu, driver
from kilodelta.export.tensorrt.flavour import EXTRAS
from kilodelta.export.tensorrt.log import logger
from kilodelta.files.dtypes import BY_TENSORRT, FLOATS, DType
from kilodelta.verify.runners.cuda_graph import Graph
from kilodelta.verify.runners.request import Request
from kilodelta.verify.runners.runner import Arrays, Batch, UnavailableError, feed

Shape: TypeAlias = tuple[int, ...]
Profile: TypeAlias = Mapping[str, tuple[Shape, ...]]


class TensorrtRunner:
    """An engine file on the first GPU.

    Args:
        path: the engine.
        flavour: "tensorrt" or "tensorrt_rtx".
        capabilities: those that the engine was built for, such as `("sm86", "sm89")`; empty if
            unknown. On a GPU among them the engine has to load, on another it is not run.
    """

    def __init__(self, path: Path, *, flavour: str, capabilities: Sequence[str] = ()) -> None:
        self.name = flavour.replace("_", "-")
        self._path, self._flavour = path, flavour
        self._capabilities = tuple(capabilities)
        self._runtime: Any = None
        self._engine: Any = None

    def available(self) -> KiloDeltaError | None:
        """Load the engine; return None, or what is missing: package, driver or the right GPU.

        Raises:
            ProofError: the engine was built for this GPU and does not load.
        """
        try:
            self._engine = self._engine or self._open()
        except (MissingPackageError, UnavailableError) as error:
            return error
        except CudaError as error:
            return UnavailableError(str(error), fix="use a machine with an NVIDIA GPU and driver")
        return None

    def run(self, batch: Batch) -> Arrays:
        """Compute the outputs by name; bfloat16 becomes float32.

        Raises:
            InputError: an input's values are not of the type that the engine takes.
            ProofError: the engine cannot run here, or no profile of it covers these shapes.
        """
        with self._call(batch) as call:
            call.start()
            return call.outputs()

    @contextmanager
    def request(self, batch: Batch) -> Iterator[Request]:
        """Bind a batch on the device and yield a request that computes it as often as asked.

        Raises:
            InputError, ProofError: as `run`.
        """
        with self._call(batch) as call, ExitStack() as graphs:

            def capture() -> Callable[[], object]:
                graph = Graph(driver(), call.stream, call.start)
                graphs.callback(graph.close)
                graphs.callback(call.wait)  # runs before the graph is closed
                return graph.launch

            yield Request(start=call.start, wait=call.wait, capture=capture)

    @contextmanager
    def _call(self, batch: Batch) -> Iterator[_Call]:
        unavailable = self.available()
        if unavailable is not None:
            raise unavailable
        try:
            with CudaStream(driver()) as stream:
                yield _Call(self._engine, stream, batch)
        except CudaError as error:
            raise ProofError(f"{self.name}: {error}", fix="see `kilodelta doctor`") from error

    def _open(self) -> Any:
        trt = require(self._flavour, extra=EXTRAS[self._flavour], why="run engines")
        gpu = _first(driver().gpus())
        self._require_capability(gpu)
        driver().use(0)
        self._runtime = trt.Runtime(logger(trt))  # has to outlive its engine
        engine = self._runtime.deserialize_cuda_engine(self._path.read_bytes())
        if engine is None:
            raise self._refused(gpu)
        return engine

    def _require_capability(self, gpu: Gpu) -> None:
        if self._capabilities and gpu.sm not in self._capabilities:
            built = ", ".join(self._capabilities)
            raise UnavailableError(
                f"the engine is for {built}, this GPU ({gpu.name}) is {gpu.sm}",
                fix=f"kilodelta export ... --tensorrt {gpu.sm}",
            )

    def _refused(self, gpu: Gpu) -> ProofError:
        what = f"TensorRT does not load {self._path.name} on {gpu.name}"
        fix = "build the engine again with the TensorRT of this machine"
        return (ProofError if self._capabilities else UnavailableError)(what, fix=fix)


class _Call:
    """One batch in a fresh execution context, its tensors bound by name."""

    def __init__(self, engine: Any, stream: CudaStream, batch: Batch) -> None:
        self._engine, self.stream = engine, stream
        self._context = engine.create_execution_context()
        self._feeds = {name: feed(batch, name, self._dtype(name)) for name in self._names("INPUT")}
        self._choose_profile(self._feeds)
        for name, array in self._feeds.items():
            self._bind(name, array)
        # Output shapes follow once all inputs are bound; it returns the names that lack one.
        _must(not self._context.infer_shapes(), "these input shapes")
        self._reserved = {name: self._reserve(name) for name in self._names("OUTPUT")}

    def start(self) -> None:
        """Enqueue one inference."""
        _must(self._context.execute_async_v3(self.stream.address), "to run")

    def wait(self) -> None:
        """Block until every inference that was enqueued has ended."""
        self.stream.wait()

    def outputs(self) -> Arrays:
        """Wait, and return the outputs of the last inference by name."""
        return {name: self._fetch(name, address) for name, address in self._reserved.items()}

    def _names(self, mode: str) -> list[str]:
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        return [name for name in names if engine.get_tensor_mode(name).name == mode]

    def _dtype(self, name: str) -> DType:
        kind = str(self._engine.get_tensor_dtype(name).name)
        if kind not in BY_TENSORRT:
            raise ProofError(
                f"{name} is {kind} in the engine, which cannot be given or read",
                fix="export a model whose inputs and outputs are plain numbers",
            )
        return BY_TENSORRT[kind]

    def _on_host(self, name: str) -> bool:
        return bool(self._engine.get_tensor_location(name).name == "HOST")

    def _choose_profile(self, feeds: Arrays) -> None:
        shapes = {name: array.shape for name, array in feeds.items()}
        index = covering(profiles(self._engine, tuple(shapes)), shapes)
        # Before any shape is set: it decides which shapes the context takes.
        chosen = self._context.set_optimization_profile_async(index, self.stream.address)
        _must(chosen, f"profile {index}")

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        """Give an input its shape and address; the engine reads shape inputs from the host."""
        host = self._on_host(name)
        # A host address stays valid: `_feeds` keeps the arrays as long as this call lives.
        address = int(array.ctypes.data) if host else self.stream.upload(array)
        _must(self._context.set_input_shape(name, array.shape), f"{name} of shape {array.shape}")
        _must(self._context.set_tensor_address(name, address), f"the memory of {name}")

    def _reserve(self, name: str) -> int:
        """Allocate memory for an output and return its address."""
        shape = tuple(self._context.get_tensor_shape(name))
        if any(extent < 0 for extent in shape) or self._on_host(name):
            raise ProofError(
                f"output {name} is a shape or has one that depends on the data: {shape}",
                fix="export a model whose output shapes follow from its input shapes",
            )
        size = np.dtype(self._dtype(name).storage).itemsize
        address = self.stream.allocate(int(np.prod(shape, dtype=np.int64)) * size)
        _must(self._context.set_tensor_address(name, address), f"the memory of {name}")
        return address

    def _fetch(self, name: str, address: int) -> NDArray[Any]:
        shape, dtype = tuple(self._context.get_tensor_shape(name)), self._dtype(name)
        array = self.stream.download(address, shape, dtype.storage)
        return FLOATS["BF16"].widen(array) if dtype.name == "BF16" else array


def profiles(engine: Any, names: Sequence[str]) -> list[Profile]:
    """Return each optimisation profile: by input its smallest, usual and largest shape."""
    return [
        {name: tuple(map(tuple, engine.get_tensor_profile_shape(name, index))) for name in names}
        for index in range(engine.num_optimization_profiles)
    ]


def covering(choices: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """Return the index of the first profile that admits `shapes`.

    Raises:
        ProofError: no profile does.

    Example:
        >>> covering([{"x": ((1,), (2,), (4,))}, {"x": ((5,), (6,), (8,))}], {"x": (7,)})
        1
    """
    for index, profile in enumerate(choices):
        if all(_admits(profile[name], shape) for name, shape in shapes.items()):
            return index
    raise ProofError(
        f"no profile of the engine covers the shapes {dict(shapes)}",
        fix="build the engine with a profile for them, or give smaller batches",
    )


def _admits(profile: tuple[Shape, ...], shape: Shape) -> bool:
    low, high = profile[0], profile[-1]
    inside = (a <= n <= b for a, n, b in zip(low, shape, high, strict=False))
    return len(low) == len(shape) and all(inside)


def _must(success: bool, what: str) -> None:
    if not success:
        raise ProofError(
            f"TensorRT refuses {what}",
            fix="build the engine again with a profile that covers these inputs",
        )


def _first(gpus: tuple[Gpu, ...]) -> Gpu:
    if not gpus:
        raise CudaError("the NVIDIA driver sees no GPU")
    return gpus[0]
