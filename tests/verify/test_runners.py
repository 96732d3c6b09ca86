"""The runners: each says why it cannot run, and none falls back in silence.

TensorRT runs here on a driver and an engine made of numpy, which check every call they get; on a
machine with a GPU the tests marked `gpu` build and run a real engine.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.errors import InputError, MissingPackageError, ProofError
from kilodelta.export.tensorrt import cuda
from kilodelta.export.tensorrt.log import logger
from kilodelta.files.dtypes import DTYPES, FLOATS
from kilodelta.verify.runners.onnx_runner import OnnxRunner, assert_provider
from kilodelta.verify.runners.runner import UNIT_ROUNDOFF, UnavailableError, feed
from kilodelta.verify.runners.tensorrt_runner import TensorrtRunner, covering
from kilodelta.verify.runners.torch_runner import TorchRunner, named_outputs
from tests.doubles.tensorrt import FakeCuda, FakeEngine, Machine, machines
from tests.support.linear import LINEAR_W, LINEAR_X, linear_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


# bfloat16


def test_bfloat16_equals_torch_on_every_kind_of_number() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, size=20_000, dtype=np.uint32).view(np.float32)
    values[:5] = [np.nan, np.inf, -np.inf, 0.0, -0.0]
    values.view(np.uint32)[5] = 0x7F800001  # a NaN whose upper half alone is infinity
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(FLOATS["BF16"].rounded(values), expected)


# torch


class Cast(torch.nn.Module):
    """A norm that computes in float32 by name, as RMS norms and rotary angles do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float() + torch.zeros(1, dtype=torch.float32)
        return torch.softmax(wide.to(torch.float32), -1, dtype=torch.float32).to(x.dtype)


def test_the_float64_reference_ignores_casts_to_float32() -> None:
    x = np.random.default_rng(0).standard_normal((4, 9))
    exact = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    [got] = TorchRunner(Cast(), ["y"], precision="float64", device="cpu").run({"x": x}).values()
    # A softmax of nine terms takes about 12 roundings of 2^-53; float32's would leave 1e-8.
    np.testing.assert_allclose(got, exact, rtol=12 * 2.0**-53)


def test_a_runner_leaves_its_module_alone() -> None:
    module = torch.nn.Linear(3, 2)
    runner = TorchRunner(module, ["y"], precision="float16", device="cpu")
    out = runner.run({"input": np.ones((1, 3), np.float32)})
    assert out["y"].dtype == np.float16
    assert module.weight.dtype == torch.float32
    assert module.training


def test_rows_computed_a_few_at_a_time_are_the_same() -> None:
    module, x = torch.nn.Linear(3, 2).eval(), np.random.default_rng(0).standard_normal((7, 3))
    runner = TorchRunner(module, ["y"], precision="float64", device="cpu")
    done: list[int] = []
    few = runner.run({"input": x}, rows=3, done=done.append)["y"]
    np.testing.assert_allclose(few, runner.run({"input": x})["y"], rtol=1e-14)
    assert (few.shape, done) == ((7, 2), [3, 6, 7])


def test_bfloat16_is_given_as_float32_and_integers_as_they_are() -> None:
    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": x, "label": x.argmax(-1), "sure": x.amax(-1) > 0}

    runner = TorchRunner(Both(), ["y", "label", "sure"], precision="bfloat16", device="cpu")
    out = runner.run({"x": np.ones((2, 3))})
    assert [out[n].dtype for n in ("y", "label", "sure")] == [np.float32, np.int64, np.bool_]


def test_inputs_that_a_model_cannot_compute_are_named() -> None:
    runner = TorchRunner(torch.nn.Conv2d(3, 8, 3), ["y"], precision="float32", device="cpu")
    with pytest.raises(InputError, match=r"cannot compute input int64 \(1, 3, 8, 8\)"):
        runner.run({"input": np.ones((1, 3, 8, 8), np.int64)})


def test_experts_are_computed_in_float64() -> None:
    """transformers' default for experts, grouped_mm, has no float64 kernel."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    batch = {"input_ids": np.array([[1, 2, 3]])}
    exact, plain = (
        TorchRunner(model, ["logits"], precision=p, device="cpu").run(batch)["logits"]
        for p in ("float64", "float32")
    )
    wide = copy.deepcopy(model).double()  # as the exact values of a quantised base are
    again = TorchRunner(wide, ["logits"], precision="float64", device="cpu").run(batch)["logits"]
    assert np.array_equal(again, exact)
    assert wide.config._experts_implementation == model.config._experts_implementation
    assert exact.dtype == np.float64
    assert model.config._experts_implementation != "batched_mm"  # the model given is left alone
    np.testing.assert_allclose(plain, exact, atol=1e-5)


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "mean": x.mean(1),
            "sum": torch.sum(x, dim=(1,), keepdim=True),
            "pool": torch.nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), 1),
            "all": x.mean(),
        }


def test_sums_in_order_are_sums_in_order() -> None:
    """Against a scalar loop in float32; torch's own pairwise sum is another number."""
    x = np.random.default_rng(0).choice(np.array([0.1, 0.7, -0.3], np.float32), (2, 500, 3))
    names = ["mean", "sum", "pool", "all"]
    runner = TorchRunner(Mean().eval(), names, precision="float32", device="cpu", in_order=True)
    found = runner.run({"x": x})
    plain = TorchRunner(Mean().eval(), names, precision="float32", device="cpu").run({"x": x})
    wanted = np.zeros((2, 3), np.float32)
    for term in range(500):
        wanted = wanted + x[:, term]
    assert not np.array_equal(plain["sum"][:, 0], wanted)
    np.testing.assert_array_equal(found["sum"][:, 0], wanted)
    np.testing.assert_array_equal(found["mean"], wanted / np.float32(500))
    np.testing.assert_array_equal(found["pool"][..., 0], wanted / np.float32(500))
    assert found["all"].shape == ()


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([1.5, 2.0], "F16", np.array([1.5, 2.0], np.float16)),
        ([1, 0], "BOOL", np.array([True, False])),
        ([1.0, 2.0], "I32", np.array([1, 2], np.int32)),
        ([1.0, -2.0], "BF16", np.array([0x3F80, 0xC000], np.uint16)),
    ],
)
def test_runtimes_are_fed_what_they_take(values: list[Any], dtype: str, expected: Any) -> None:
    found = feed({"x": np.array(values)}, "x", DTYPES[dtype])
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match="input x holds nan as float64; the model takes int64"):
        feed({"x": np.array([np.nan])}, "x", DTYPES["I64"])


def test_integers_and_booleans_are_not_cast() -> None:
    class Kinds(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            assert (a.dtype, b.dtype, c.dtype) == (torch.int64, torch.bool, torch.float16)
            return c

    batch = {"a": np.array([1]), "b": np.array([True]), "c": np.array([1.0], np.float32)}
    TorchRunner(Kinds(), ["y"], precision="float16", device="cpu").run(batch)


def test_outputs_are_named() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert named_outputs({"b": y, "a": x, "cache": None}, ["a", "b"]) == {"a": x, "b": y}
    assert named_outputs((x, y), ["a", "b"]) == {"a": x, "b": y}
    assert named_outputs(x, ["a"]) == {"a": x}
    with pytest.raises(ProofError, match="does not return c, cache"):
        named_outputs({"a": x, "cache": None}, ["a", "c", "cache"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch has a CUDA device")
def test_torch_says_that_it_has_no_gpu() -> None:
    runner = TorchRunner(torch.nn.Identity(), ["y"], precision="float32", device="cuda")
    assert isinstance(runner.available(), UnavailableError)
    with pytest.raises(UnavailableError, match="torch sees no CUDA device"):
        runner.run({"input": np.zeros(1)})


# ONNX Runtime


def model(dtype: int, *nodes: Any, weight: Any = None) -> Any:
    """x (n, n) -> y, with opset 18."""
    helper = onnx.helper
    infos = [helper.make_tensor_value_info(name, dtype, ["n", "n"]) for name in ("x", "y")]
    weights = [] if weight is None else [weight]
    graph = helper.make_graph(list(nodes), "g", infos[:1], infos[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_onnx_casts_inputs_to_the_files_dtype(tmp_path: Path) -> None:
    double = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    path = tmp_path / "m.onnx"
    onnx.save(model(onnx.TensorProto.FLOAT16, double), str(path))
    out = OnnxRunner(path, device="cpu").run({"x": np.full((2, 2), 1.5), "unused": np.zeros(1)})
    assert out["y"].dtype == np.float16
    assert (out["y"] == 3.0).all()


def test_onnx_takes_and_gives_bfloat16() -> None:
    identity = onnx.helper.make_node("Identity", ["x"], ["y"])
    data = model(onnx.TensorProto.BFLOAT16, identity).SerializeToString()
    out = OnnxRunner(data, device="cpu").run({"x": np.array([[1.0, 2.0**-7], [3.14, -1e30]])})
    expected = torch.tensor([[1.0, 2.0**-7], [3.14, -1e30]]).bfloat16().float().numpy()
    np.testing.assert_array_equal(out["y"], expected)


def test_a_missing_kernel_is_a_reason_not_a_failure() -> None:
    square = onnx.helper.make_node("MatMul", ["x", "x"], ["y"])
    data = model(onnx.TensorProto.BFLOAT16, square).SerializeToString()
    reason = OnnxRunner(data, device="cpu").available()
    assert isinstance(reason, UnavailableError)
    assert "MatMul" in reason.what


def test_a_broken_file_is_a_failure_not_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(ProofError, match="ONNX Runtime refuses the model"):
        OnnxRunner(path, device="cpu").available()


def test_onnx_names_the_input_it_misses() -> None:
    identity = onnx.helper.make_node("Identity", ["x"], ["y"])
    data = model(onnx.TensorProto.FLOAT, identity).SerializeToString()
    with pytest.raises(ProofError, match="wants an input 'x', the inputs hold ids"):
        OnnxRunner(data, device="cpu").run({"ids": np.zeros((1, 1))})


def test_shapes_that_onnx_refuses_are_a_failure() -> None:
    square = onnx.helper.make_node("MatMul", ["x", "x"], ["y"])
    data = model(onnx.TensorProto.FLOAT, square).SerializeToString()
    with pytest.raises(ProofError, match="cannot compute these inputs"):
        OnnxRunner(data, device="cpu").run({"x": np.zeros((2, 3))})


def test_external_data_is_found_from_bytes(tmp_path: Path) -> None:
    weight = onnx.numpy_helper.from_array(np.full((64, 64), 2.0, np.float32), "w")
    product = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    path = tmp_path / "m.onnx"
    onnx.save(
        model(onnx.TensorProto.FLOAT, product, weight=weight),
        str(path),
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    data = onnx.load(str(path), load_external_data=False).SerializeToString()
    out = OnnxRunner(data, device="cpu", folder=tmp_path).run({"x": np.eye(64)})
    assert (out["y"] == 2.0).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_onnx_on_cuda_says_what_is_missing(tmp_path: Path) -> None:
    reason = OnnxRunner(tmp_path / "m.onnx", device="cuda").available()
    assert isinstance(reason, UnavailableError)
    assert "CUDAExecutionProvider" in reason.what
    assert ".[gpu]" in reason.fix


def test_a_session_that_fell_back_is_noticed() -> None:
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    assert_provider(session, "CPUExecutionProvider")
    with pytest.raises(UnavailableError, match="asked for CUDAExecutionProvider and took CPU"):
        assert_provider(session, "CUDAExecutionProvider")


def test_the_runner_asserts_the_provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without cuDNN, ONNX Runtime lists CUDA and then opens the session on the CPU."""
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    asked = []

    def session(source: str, options: Any, providers: Any) -> Any:
        asked.append(providers)
        return fallen

    ort = SimpleNamespace(
        __version__="0",
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        SessionOptions=SimpleNamespace,
        InferenceSession=session,
    )
    monkeypatch.setattr("kilodelta.verify.runners.onnx_runner.require", lambda *_, **__: ort)
    reason = OnnxRunner(tmp_path / "m.onnx", device="cuda").available()
    assert isinstance(reason, UnavailableError)
    assert "took CPUExecutionProvider" in reason.what
    assert asked[0][0] == ("CUDAExecutionProvider", {"use_tf32": "0"})


# TensorRT and the driver under it


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Put a driver and a TensorRT in place; gives the driver back."""
    with machines(monkeypatch) as put:
        yield put


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"engine")
    return path


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("FLOAT", np.float32), ("INT64", np.int64), ("INT32", np.int32), ("BF16", np.uint16)],
)
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_an_engine_is_bound_by_name_and_profile(
    machine: Machine, engine_file: Path, kind: str, dtype: Any, rows: int
) -> None:
    library = machine(FakeEngine(kind, dtype))
    x = np.arange(rows * 3).reshape(rows, 3)
    runner = TensorrtRunner(engine_file, flavour="tensorrt_rtx", capabilities=["sm86"])
    for _ in range(2):
        np.testing.assert_array_equal(runner.run({"x": x})["y"], 2 * x)
    assert library.memory == {}  # every buffer is given back
    once = ["synchronize", "download", "synchronize", "destroy"]
    assert library.log == ["retain", *once, *once]


def test_no_profile_covers_the_shape(machine: Machine, engine_file: Path) -> None:
    library = machine(FakeEngine("FLOAT", np.float32))
    with pytest.raises(ProofError, match=r"covers the shapes \{'x': \(9, 3\)\}"):
        TensorrtRunner(engine_file, flavour="tensorrt").run({"x": np.zeros((9, 3))})
    assert library.memory == {}


def test_profiles_are_chosen_by_every_input() -> None:
    first = {"a": ((1, 1), (2, 2), (3, 3)), "b": ((1,), (1,), (1,))}
    second = {"a": ((1, 1), (2, 2), (3, 9)), "b": ((1,), (1,), (4,))}
    assert covering([first, second], {"a": (3, 3), "b": (1,)}) == 0
    assert covering([first, second], {"a": (3, 3), "b": (2,)}) == 1
    with pytest.raises(ProofError):
        covering([first, second], {"a": (3, 3, 1), "b": (1,)})


def test_an_engine_for_another_gpu_is_not_run(machine: Machine, engine_file: Path) -> None:
    machine(FakeEngine("FLOAT", np.float32), capability=(12, 0))
    reason = TensorrtRunner(
        engine_file, flavour="tensorrt_rtx", capabilities=["sm86", "sm89"]
    ).available()
    assert isinstance(reason, UnavailableError)
    assert reason.what == "the engine is for sm86, sm89, this GPU (Fake RTX) is sm120"


def test_an_engine_for_this_gpu_has_to_load(machine: Machine, engine_file: Path) -> None:
    machine(None)
    with pytest.raises(ProofError, match=r"does not load model.engine on Fake RTX") as raised:
        TensorrtRunner(engine_file, flavour="tensorrt", capabilities=["sm86"]).available()
    assert not isinstance(raised.value, UnavailableError)
    unknown = TensorrtRunner(engine_file, flavour="tensorrt").available()
    assert isinstance(unknown, UnavailableError)


def test_a_driver_without_devices_is_a_reason(machine: Machine, engine_file: Path) -> None:
    machine(None, devices=0)
    reason = TensorrtRunner(engine_file, flavour="tensorrt").available()
    assert isinstance(reason, UnavailableError)
    assert reason.what == "cuInit failed: no CUDA-capable device is detected (CUresult 100)"


def test_the_driver_tells_what_there_is() -> None:
    driver = cuda.Driver(FakeCuda(capability=(8, 9)))
    assert driver.version() == (13, 2)
    [gpu] = driver.gpus()
    assert (gpu.name, gpu.sm, gpu.memory_bytes) == ("Fake RTX", "sm89", 12 << 30)


def test_a_missing_flavour_is_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, engine_file: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    reason = TensorrtRunner(engine_file, flavour="tensorrt").available()
    assert isinstance(reason, MissingPackageError)
    assert ".[tensorrt]" in reason.fix


def has_gpu() -> bool:
    try:
        return bool(cuda.driver().gpus())
    except cuda.CudaError:
        return False


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_without_a_gpu_both_flavours_say_so(flavour: str, engine_file: Path) -> None:
    reason = TensorrtRunner(engine_file, flavour=flavour).available()
    assert isinstance(reason, (MissingPackageError, UnavailableError))
    with pytest.raises(type(reason)):
        TensorrtRunner(engine_file, flavour=flavour).run({})


gpu = pytest.mark.skipif(not has_gpu(), reason="no GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("precision", ["float64", "float32", "float16", "bfloat16"])
def test_torch_on_a_real_gpu(precision: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    x, module = np.random.default_rng(0).standard_normal((5, 64)), torch.nn.Linear(64, 3)
    found, exact = (
        TorchRunner(module, ["y"], precision=p, device=d).run({"input": x})["y"]
        for p, d in ((precision, "cuda"), ("float64", "cpu"))
    )
    assert_close(found, exact, module, x, precision)


@pytest.mark.gpu
@gpu
def test_onnx_runtime_on_a_real_gpu() -> None:
    if OnnxRunner(linear_model("float32"), device="cuda").available() is not None:
        pytest.skip("this ONNX Runtime has no CUDA")
    found = OnnxRunner(linear_model("float32"), device="cuda").run({"x": LINEAR_X})["y"]
    assert_close(found, LINEAR_X @ LINEAR_W, None, LINEAR_X, "float32")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_tensorrt_on_a_real_gpu(flavour: str, precision: str, tmp_path: Path) -> None:
    trt = pytest.importorskip(flavour)
    [here, *_] = cuda.driver().gpus()
    if flavour == "tensorrt_rtx" and not hasattr(trt.ComputeCapability, here.sm.upper()):
        pytest.skip(f"TensorRT-RTX knows no {here.sm}")
    path = tmp_path / "model.engine"
    path.write_bytes(build(trt, linear_model(precision)))
    runner = TensorrtRunner(path, flavour=flavour, capabilities=[here.sm])
    assert runner.available() is None
    for rows in (1, 4, 8):  # the first profile, its edge, the second profile
        found = runner.run({"x": LINEAR_X[:rows]})["y"]
        assert_close(found, LINEAR_X[:rows] @ LINEAR_W, None, LINEAR_X[:rows], precision)
    with pytest.raises(ProofError, match="no profile"):
        runner.run({"x": np.zeros((9, 64))})


def build(trt: Any, model: bytes) -> bytes:
    """A strongly typed engine for the GPU here, without TF32, with two profiles."""
    log = logger(trt)
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(model)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for low, high in ((1, 4), (5, 8)):
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (low, 64), (high, 64), (high, 64))
        config.add_optimization_profile(profile)
    return bytes(builder.build_serialized_network(network, config))


def assert_close(found: Any, exact: Any, module: Any, x: Any, precision: str) -> None:
    """A product of 64 terms is off by at most 64 + 3 roundings of the sum of magnitudes: inputs
    and weights are rounded once each, products and sums 64 times, the result once."""
    weights = LINEAR_W if module is None else module.weight.detach().double().numpy().T
    bound = 67 * UNIT_ROUNDOFF[precision] * (np.abs(x) @ np.abs(weights) + 1)
    assert (np.abs(found.astype(float) - exact) <= bound).all()


def test_the_model_that_gpus_run_is_right() -> None:
    found = OnnxRunner(linear_model("float32"), device="cpu").run({"x": LINEAR_X})["y"]
    assert_close(found, LINEAR_X @ LINEAR_W, None, LINEAR_X, "float32")
