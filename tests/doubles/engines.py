"""A TensorRT whose engines run: ONNX Runtime on a CPU behind TensorRT's interface, and a driver
whose device memory is the host's. With it every path through engines is walked without a GPU.

An engine's plan is that of `fake_refit` with the ONNX file and the profile in it.
"""

from __future__ import annotations

import ctypes
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from kilodelta.files import staging
from tests.doubles import refitter as fake_refit
from tests.doubles.refitter import DataType
from tests.doubles.tensorrt import FakeCuda

KINDS = {1: DataType.FLOAT, 7: DataType.INT64, 10: DataType.HALF}
NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64}


class Cuda(FakeCuda):
    """A driver that captures: between the two calls work is kept, and done when it is launched."""

    def __init__(self) -> None:
        super().__init__(capability=(8, 6))
        self.captured: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launches = 0
        self.capturable = True

    def do(self, work: Callable[[], None]) -> None:
        """What a stream is given."""
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:  # noqa: N802
        self.captured = []
        return 0 if stream.value == 77 and mode == 1 else 1

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:  # noqa: N802
        assert self.captured is not None
        work, self.captured = self.captured, None
        return self._keep(graph, work) if self.capturable else 901

    def cuGraphInstantiateWithFlags(self, ready: Any, graph: Any, flags: Any) -> int:  # noqa: N802
        return self._keep(ready, self.graphs[graph.value])

    def cuGraphLaunch(self, ready: Any, stream: Any) -> int:  # noqa: N802
        self.launches += 1
        for work in self.graphs[ready.value]:
            work()
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:  # noqa: N802
        del self.graphs[graph.value]
        return 0

    cuGraphExecDestroy = cuGraphDestroy  # noqa: N815

    def _keep(self, handle: Any, work: list[Callable[[], None]]) -> int:
        handle._obj.value = max(self.graphs, default=0) + 1
        self.graphs[handle._obj.value] = work
        return 0


@dataclass(kw_only=True)
class Engine(fake_refit.Engine):
    """Runs its ONNX file with the weights that it has now."""

    model: bytes
    profile: dict[str, Any]
    cuda: Cuda
    num_optimization_profiles: int = 1
    ports: dict[str, tuple[str, DataType]] = field(init=False)

    def __post_init__(self) -> None:
        graph = onnx.load_from_string(self.model).graph
        named = {"INPUT": graph.input, "OUTPUT": graph.output}
        self.ports = {
            value.name: (mode, KINDS[value.type.tensor_type.elem_type])
            for mode, values in named.items()
            for value in values
        }

    def plan(self) -> bytes:
        file = io.BytesIO()
        weights = np.frombuffer(super().plan(), np.uint8)
        model, profile = np.frombuffer(self.model, np.uint8), json.dumps(self.profile)
        np.savez(file, weights=weights, model=model, profile=profile)
        return file.getvalue()

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name=self.ports[name][0])

    def get_tensor_dtype(self, name: str) -> Any:
        return self.ports[name][1]

    def get_tensor_location(self, name: str) -> Any:
        return fake_refit.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, index: int) -> Any:
        return self.profile[name]

    def create_execution_context(self) -> Context:
        return Context(self)

    def session(self) -> Any:
        model = onnx.load_from_string(self.model)
        for tensor in model.graph.initializer:
            if tensor.name in self.data:
                tensor.ClearField("float_data")
                tensor.raw_data = self.data[tensor.name]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # more of them would spin
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.session = engine, engine.session()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.at: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        return index == 0 and stream == 77

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.at[name] = address
        return address in self.engine.cuda.memory

    def infer_shapes(self) -> list[str]:
        for name, value in self._compute().items():
            self.shapes[name] = value.shape
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def execute_async_v3(self, stream: int) -> bool:
        self.engine.cuda.do(self._execute)
        return stream == 77

    def _execute(self) -> None:
        for name, value in self._compute().items():
            ctypes.memmove(self.at[name], value.ctypes.data, value.nbytes)

    def _compute(self) -> dict[str, Any]:
        names = [name for name, (mode, _) in self.engine.ports.items() if mode == "OUTPUT"]
        feeds = {
            name: self._read(name, kind)
            for name, (mode, kind) in self.engine.ports.items()
            if mode == "INPUT"
        }
        return dict(zip(names, self.session.run(names, feeds), strict=True))

    def _read(self, name: str, kind: DataType) -> Any:
        shape, dtype = self.shapes[name], np.dtype(NUMPY[kind.name])
        raw = ctypes.string_at(self.at[name], int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(raw, dtype).reshape(shape)


class TensorRT(fake_refit.TensorRT):
    """The module `tensorrt`; `forgets` makes refits that say they are done and are not."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__("tensorrt", "10.14.1")
        self.__spec__ = ModuleSpec("tensorrt", None)  # libraries ask whether it is there
        self.cuda, self.forgets = cuda, False
        self.built: list[tuple[str, tuple[str, ...]]] = []

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        return SimpleNamespace(deserialize_cuda_engine=self._load)

    def Refitter(self, engine: Any, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        refitter = super().Refitter(engine, logger)
        if self.forgets:
            refitter._refit = lambda: True
        return refitter

    def build(
        self,
        trt: Any,
        source: Path,
        engine: Path,
        *,
        capabilities: Sequence[str],
        profile: Any,
        tf32: bool = False,
        refit: Sequence[str] = (),
        progress: Any = None,
    ) -> int:
        """What `kilodelta.export.tensorrt.build.build` does."""
        assert trt is self
        assert capabilities == ("sm86",)
        model = onnx.load(source)
        held = {t.name: t for t in model.graph.initializer if t.name in set(refit)}
        assert held.keys() == set(refit)
        inputs = {value.name for value in model.graph.input}
        assert inputs == set(profile)
        self.built.append((source.name, tuple(refit)))
        plan = Engine(
            kinds={name: KINDS[t.data_type] for name, t in held.items()},
            data={name: onnx.numpy_helper.to_array(t).tobytes() for name, t in held.items()},
            marked=list(held),
            refittable=bool(refit),
            model=model.SerializeToString(),
            profile={name: [list(shape) for shape in points] for name, points in profile.items()},
            cuda=self.cuda,
        ).plan()
        staging.write(engine, plan)
        return len(plan)

    def _load(self, plan: bytes) -> Engine:
        with np.load(io.BytesIO(plan)) as found:
            weights = fake_refit.parse(found["weights"].tobytes())
            assert weights is not None
            profile = json.loads(str(found["profile"]))
            model = found["model"].tobytes()
        return Engine(**vars(weights), model=model, profile=profile, cuda=self.cuda)
