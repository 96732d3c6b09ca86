"""TensorRT engines: real RTX builds, and everything that TensorRT refuses said in full."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")

import onnx
import tensorrt_rtx as rtx
from onnx import TensorProto, helper, numpy_helper

from kilodelta.errors import ExportError, InputError, KiloDeltaError, MissingPackageError
from kilodelta.export.manifest.facts import Profile
from kilodelta.export.tensorrt import build as tensorrt
from kilodelta.export.tensorrt import cuda
from kilodelta.export.tensorrt.flavour import buildable, choose
from kilodelta.export.tensorrt.log import clean_stdout, logger
from kilodelta.export.tensorrt.network import Network
from kilodelta.export.tensorrt.watch import BuildWatch

SIZE = 16
PROFILE: Profile = {"x": ((1, SIZE), (4, SIZE), (8, SIZE))}
ELEMENT = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}


def weight(name: str, dtype: str, seed: int) -> Any:
    values = np.random.default_rng(seed).normal(size=(SIZE, SIZE)).astype(np.float32)
    if dtype == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return helper.make_tensor(name, TensorProto.BFLOAT16, values.shape, bits, raw=True)
    return numpy_helper.from_array(values.astype(dtype), name)


def write(path: Path, nodes: Sequence[Any], *, dtype: str = "float32", layers: int = 0) -> Path:
    """A model from x (batch, 16) to y."""
    value = helper.make_tensor_value_info
    domains = {node.domain for node in nodes}
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [value("x", ELEMENT[dtype], ["batch", SIZE])],
        [value("y", ELEMENT[dtype], None)],
        [weight(f"w{index}", dtype, index) for index in range(layers)],
    )
    opsets = [helper.make_opsetid(domain, 1 if domain else 20) for domain in {"", *domains}]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


def mlp(path: Path, *, dtype: str = "float32", layers: int = 3) -> Path:
    """Matrix products and ReLUs; the last one is y."""
    nodes, last = [], "x"
    for index in range(layers):
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"p{index}"], f"mul{index}"))
        last = "y" if index == layers - 1 else f"r{index}"
        nodes.append(helper.make_node("Relu", [f"p{index}"], [last], f"relu{index}"))
    return write(path, nodes, dtype=dtype, layers=layers)


def build(path: Path, *, capabilities: Sequence[str] = ("sm86",), **options: Any) -> int:
    engine = path.with_suffix(".engine")
    given = {"profile": PROFILE, **options}
    return tensorrt.build(rtx, path, engine, capabilities=capabilities, **given)


@pytest.mark.parametrize("dtype", ELEMENT)
def test_an_engine_for_several_gpus_in_every_precision(dtype: str, tmp_path: Path) -> None:
    path = mlp(tmp_path / "m.onnx", dtype=dtype)
    events: list[Any] = []
    size = build(path, capabilities=("sm80", "sm89", "sm121"), progress=events.append)
    data = path.with_suffix(".engine").read_bytes()
    assert len(data) == size
    assert numpy_helper_bytes(path) in data  # the weights, in the ONNX file's own precision
    assert [event.done for event in events] == list(range(1, len(events) + 1))
    assert build(path, capabilities=("sm80", "sm89", "sm121")) == size
    assert path.with_suffix(".engine").read_bytes() == data


def numpy_helper_bytes(path: Path) -> bytes:
    """The last row of the last weight as it lies in the file."""
    tensor = onnx.load(path).graph.initializer[-1]
    width = len(tensor.raw_data) // SIZE
    return bytes(tensor.raw_data[-width:])


def test_turing_takes_float16_only(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ExportError, match=f"sm75 takes no {dtype}") as caught:
            choose("auto", ("sm86", "sm75"), (dtype, "float16"))
        assert "--dtype fp16" in caught.value.fix
        with pytest.raises(ExportError, match=r"(?s)builds no engine from m\.onnx:.*(SM|sm)75"):
            build(mlp(tmp_path / "m.onnx", dtype=dtype), capabilities=("sm75",))
    assert choose("auto", ("sm86", "sm75"), ("float16",)) is rtx
    assert build(mlp(tmp_path / "m.onnx", dtype="float16"), capabilities=("sm75",)) > 0


def test_strongly_typed_without_tf32_for_the_gpus_asked(tmp_path: Path) -> None:
    network = Network(rtx, mlp(tmp_path / "m.onnx"))
    assert network.network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    for tf32 in (False, True):
        config = tensorrt._config(network, ("sm86", "sm120"), PROFILE, tf32=tf32)
        assert config.get_flag(rtx.BuilderFlag.TF32) is tf32
        assert config.num_optimization_profiles == 1
        chosen = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
        assert chosen == [rtx.ComputeCapability.SM86, rtx.ComputeCapability.SM120]


def test_every_objection_of_the_parser_is_told(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("StringNormalizer", ["x"], ["a"], "first"),
        helper.make_node("Mystery", ["x"], ["b"], "second", domain="nobody"),
        helper.make_node("Relu", ["x"], ["y"], "third"),
    ]
    with pytest.raises(ExportError) as caught:
        build(write(tmp_path / "m.onnx", nodes))
    lines = caught.value.what.splitlines()
    assert lines[0] == f"tensorrt_rtx {rtx.__version__} does not take m.onnx:"
    assert lines[1].startswith("  UNSUPPORTED_NODE at node first (StringNormalizer): ")
    assert lines[2].startswith("  INVALID_NODE at node second (Mystery): ")
    assert "Plugin not found" in lines[2]
    assert len(lines) == 3
    assert not (tmp_path / "m.engine").exists()


@pytest.mark.parametrize("data", [b"", b"junk" * 50, None])
def test_a_damaged_onnx_file(data: bytes | None, tmp_path: Path) -> None:
    path = mlp(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:-300] if data is None else data)
    with pytest.raises(ExportError, match=r"(?s)does not take m\.onnx:\n  \w+"):
        build(path)


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    path = mlp(tmp_path / "m.onnx")
    with pytest.raises(ExportError, match="has the inputs x, the profile names z"):
        build(path, profile={"z": PROFILE["x"]})
    with pytest.raises(ExportError, match="MIN<=OPT<=MAX"):
        build(path, profile={"x": ((4, SIZE), (2, SIZE), (8, SIZE))})
    with pytest.raises(ExportError, match=r"m\.onnx:\n  "):
        build(path, profile={"x": ((1, 5), (2, 5), (8, 5))})


def test_errors_of_one_build_are_not_told_by_the_next(tmp_path: Path) -> None:
    path = mlp(tmp_path / "m.onnx")
    with pytest.raises(ExportError):
        build(path, profile={"x": ((4, SIZE), (2, SIZE), (8, SIZE))})
    assert logger(rtx).errors
    with pytest.raises(ExportError) as caught:
        build(mlp(tmp_path / "m.onnx"), capabilities=("sm75",))
    assert "MIN<=OPT<=MAX" not in caught.value.what
    assert logger(rtx) is logger(rtx)


def refused(error: type[KiloDeltaError], text: str, *arguments: Any) -> None:
    with pytest.raises(error, match=text):
        choose(*arguments)


def test_what_cannot_be_built_is_said_before_any_work() -> None:
    refused(ExportError, "builds for sm75, .*, sm121, not for sm87", "auto", ("sm87",), ())
    refused(MissingPackageError, "tensorrt is not installed", "tensorrt", ("sm89",), ())
    refused(InputError, "trt is no flavour", "trt", ("sm89",), ())
    for wrong in ((), ("",), ("89",), ("8.9",), ("sm89", "sm89"), ("sm89\n",), ("SM89",)):
        refused(InputError, "is no list of compute capabilities", "auto", wrong, ())
    assert buildable(rtx) == ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingPackageError, match="build TensorRT engines") as caught:
        choose("tensorrt_rtx", ("sm89",), ())
    assert caught.value.fix == "in a clone of kilodelta: pip install '.[rtx]'"


@pytest.fixture
def classic(monkeypatch: pytest.MonkeyPatch) -> Any:
    """RTX's own classes under the classic name, without what only RTX has; an sm90 GPU."""
    module = types.ModuleType("tensorrt")
    for name in dir(rtx):
        if name != "ComputeCapability" and not name.startswith("__"):
            setattr(module, name, getattr(rtx, name))
    module.__version__ = "11.4.0"  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(cuda, "present", lambda: "sm90")
    return module


def test_classic_tensorrt_builds_for_the_gpu_present(
    classic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose("auto", ("sm90",), ("bfloat16",)) is classic
    assert choose("auto", ("sm89",), ()) is rtx
    assert choose("tensorrt", ("sm90",), ()) is classic
    refused(ExportError, "not for sm89: this one is sm90", "tensorrt", ("sm89",), ())
    refused(ExportError, "not for sm89: this one is sm90", "auto", ("sm90", "sm89"), ())
    network = Network(classic, mlp(tmp_path / "m.onnx"))
    config = tensorrt._config(network, ("sm90",), PROFILE, tf32=False)
    assert config.num_compute_capabilities == 0  # left alone: classic has no such thing
    assert not config.get_flag(rtx.BuilderFlag.TF32)
    monkeypatch.setattr(cuda, "present", lambda: "sm75")
    refused(ExportError, "sm75 takes no bfloat16", "tensorrt", ("sm75",), ("bfloat16",))
    assert choose("tensorrt", ("sm75",), ("float32",)) is classic
    monkeypatch.setattr(cuda, "present", lambda: None)
    refused(ExportError, "no NVIDIA GPU or driver was found", "tensorrt", ("sm90",), ())


def test_tensorrt_that_does_not_start(
    classic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(log: Any) -> None:
        log.log(rtx.ILogger.Severity.ERROR, "CUDA driver version is insufficient")
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(classic, "Builder", fail)
    with pytest.raises(ExportError, match=r"11\.4\.0 does not start: CUDA driver version is"):
        Network(classic, mlp(tmp_path / "m.onnx"))


def test_refittable_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mlp(tmp_path / "m.onnx")
    monkeypatch.setattr(cuda, "present", lambda: None)
    with pytest.raises(ExportError, match="refittable engines only where a GPU") as caught:
        build(path, refit=("w1",))
    assert "not refittable" in caught.value.fix
    monkeypatch.setattr(cuda, "present", lambda: "sm89")
    with pytest.raises(ExportError, match="has no weights nothing, more that"):
        build(path, refit=("w1", "nothing", "more"))
    network = Network(rtx, path)
    network.mark_refittable(["w1"])
    marked = [network.network.are_weights_marked_refittable(f"w{i}") for i in range(3)]
    assert marked == [False, True, False]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mlp(tmp_path / "m.onnx", layers=20)
    pressed: list[Any] = []
    stopped = threading.Event()
    stop = BuildWatch.stop

    def stop_and_tell(watch: BuildWatch) -> None:
        stop(watch)
        stopped.set()

    monkeypatch.setattr(BuildWatch, "stop", stop_and_tell)

    def press(event: Any) -> None:
        if not pressed:
            pressed.append(event)
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped.wait(60)  # the build stands still until the main thread has taken it

    with pytest.raises(KeyboardInterrupt):
        build(path, progress=press)
    assert pressed
    assert "BuildCanceled" in "".join(logger(rtx).errors)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["m.onnx"]


def test_what_the_callback_raises_ends_the_build_and_comes_through(tmp_path: Path) -> None:
    def fail(event: Any) -> None:
        raise InputError("enough", fix="stop")

    with pytest.raises(InputError, match="enough"):
        build(mlp(tmp_path / "m.onnx"), progress=fail)
    assert not (tmp_path / "m.engine").exists()


def test_what_compilers_print_stays_off_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    print("before", flush=True)
    with clean_stdout():
        os.write(1, b"chatter\n")
    print("after", flush=True)
    assert capfd.readouterr() == ("before\nafter\n", "chatter\n")
