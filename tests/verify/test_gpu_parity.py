"""Part two of a GPU's proof, on a CPU: its engines are ONNX Runtime's
(`tests/doubles/engines.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
from kilodelta.errors import ExportError, ProofError
from kilodelta.export.tensorrt import build, cuda
from kilodelta.verify.gpu import latency as gpu_latency
from kilodelta.verify.gpu import parity
from kilodelta.verify.gpu.model import Models, make
from kilodelta.verify.gpu.part import MEASURED, PartRow, Setting, guarded, run
from kilodelta.verify.parity.cases import Case
from kilodelta.verify.parity.result import FAILED, NOT_RUN, PASSED
from kilodelta.verify.runners import request as requests
from kilodelta.verify.runners.onnx_runner import OnnxRunner
from kilodelta.verify.runners.request import Request, latency
from tests.doubles import engines

pytestmark = pytest.mark.filterwarnings("default")
CORNERS = ("smallest 1x1", "usual 8x32", "largest 32x32")


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[engines.TensorRT]:
    """A TensorRT and a driver in place; the other flavour is missing."""
    library = engines.Cuda()
    module = engines.TensorRT(library)
    monkeypatch.setattr(cuda, "_load", lambda: library)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setattr(build, "build", module.build)
    monkeypatch.setattr(requests, "LONGEST_SECONDS", 0.02)
    monkeypatch.setattr(requests, "WARM_UP", 1)
    cuda.driver.cache_clear()
    yield module
    cuda.driver.cache_clear()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make(tmp_path_factory.mktemp("models"), small=True)


def bench(models: Models, folder: Path) -> Any:
    return parity._Bench(
        models=models, device=torch.device("cpu"), folder=folder, dtypes=("float32",)
    )


def by_name(rows: Iterable[PartRow]) -> dict[str, PartRow]:
    listed = list(rows)
    found = {row.what: row for row in listed}
    assert len(found) == len(listed)  # no two rows have one name
    return found


def statuses(rows: Iterable[PartRow]) -> dict[str, str]:
    return {what: row.status for what, row in by_name(rows).items()}


def test_every_path_through_engines_is_walked(trt: engines.TensorRT, tmp_path: Path) -> None:
    setting = Setting(device="cpu", folder=tmp_path, small=True)
    part = run("parity", parity.parity, setting)
    plain, refittable = "model.fp32.engine", "model.fp32.engine, tensorrt, refittable"
    refitted, adapter = f"{refittable}, refitted and saved", "adapter graph float32"
    wanted = {
        "onnx: merged model in torch-cpu, float32": PASSED,
        "onnx: model.fp32.onnx in onnxruntime-cpu, float32": PASSED,
        "adapter graph float32 in onnxruntime-cpu, float32": PASSED,
        f"tensorrt: {plain} in tensorrt, float32": PASSED,
        f"tensorrt, refittable: {plain} in tensorrt, float32": PASSED,
        f"{refittable}, refit": MEASURED,
        f"{refitted} in tensorrt, float32": PASSED,
        f"{adapter} in tensorrt, float32": PASSED,
        "tensorrt_rtx": NOT_RUN,
    }
    timed = [
        "merged model in torch-cpu, float32", "model.fp32.onnx in onnxruntime-cpu",
        f"{adapter} in onnxruntime-cpu", f"{plain} in tensorrt", f"{refittable} in tensorrt",
        f"{refitted} in tensorrt", f"{adapter} in tensorrt",
    ]  # fmt: skip
    wanted |= {f"{name}, {corner}": MEASURED for name in timed for corner in CORNERS}
    found = statuses(part.rows)
    assert {what: found.get(what) for what in wanted} == wanted
    assert FAILED not in found.values(), part
    assert trt.built[0] == ("model.fp32.onnx", ())
    assert len(trt.built[1][1]) == 12  # both layers' six matrices
    assert trt.built[2] == ("adapter-float32.onnx", ())
    latencies = [row for row in part.rows if "in tensorrt, " in row.what and row.status == MEASURED]
    assert len(latencies) == 4 * len(CORNERS)
    for row in latencies:
        assert "; in a CUDA graph median" in row.found
        assert row.numbers.keys() == {"median_s", "p99_s", "rows_a_second", "graph"}
    assert trt.cuda.launches > 4 * len(CORNERS)
    assert trt.cuda.memory == {}
    assert trt.cuda.graphs == {}


def test_a_refit_that_does_nothing_fails_on_the_saved_plan(
    trt: engines.TensorRT, models: Models, tmp_path: Path
) -> None:
    trt.forgets = True
    options = {"tensorrt": ("sm86",), "flavour": "tensorrt", "dtype": "fp32", "refittable": True}
    maker = parity._maker("tensorrt", ("float32",))
    found = statuses(bench(models, tmp_path)._refitted(maker, options))
    assert [what for what, status in found.items() if status == FAILED] == [
        "model.fp32.engine, tensorrt, refittable, refitted and saved in tensorrt, float32"
    ]


def test_one_kind_of_engine_that_fails_stops_no_other(
    trt: engines.TensorRT, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Iterator[PartRow]:
        raise ExportError("no kernel for it", fix="none")
        yield

    def work(self: Any, dtype: str, maker: Any) -> Iterator[PartRow]:
        yield PartRow(what=f"adapter {dtype}", found="")

    monkeypatch.setattr(parity._Bench, "_fixed", fail)
    monkeypatch.setattr(parity._Bench, "_refitted", fail)
    monkeypatch.setattr(parity._Bench, "adapter", work)
    rows = bench(models, tmp_path).engines("tensorrt")
    assert [(row.what, row.found, row.status) for row in rows] == [
        ("tensorrt", "no kernel for it", FAILED),
        ("tensorrt, refittable", "no kernel for it", FAILED),
        ("adapter float32", "", PASSED),
    ]


def test_a_gpu_that_a_flavour_does_not_build_for_is_no_failure(
    trt: engines.TensorRT, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(flavour: str, *_: Any) -> Any:
        raise ExportError(f"{flavour} builds for sm89, not for sm86", fix="none")

    monkeypatch.setattr(parity, "choose", refuse)
    [row] = guarded("tensorrt", bench(models, tmp_path).engines("tensorrt"))
    assert row.status == NOT_RUN
    assert row.found == "not run: tensorrt builds for sm89, not for sm86"


@pytest.mark.skipif(cuda.present() is not None, reason="a GPU is there")
def test_without_a_gpu_engines_say_so(models: Models, tmp_path: Path) -> None:
    [row] = guarded("tensorrt_rtx", bench(models, tmp_path).engines("tensorrt_rtx"))
    assert (row.status, row.found) == (NOT_RUN, "not run: no NVIDIA GPU or driver")


def test_what_a_driver_does_not_capture_is_timed_without(
    trt: engines.TensorRT, models: Models, tmp_path: Path
) -> None:
    trt.cuda.capturable = False
    rows = by_name(bench(models, tmp_path).adapter("float32", parity._maker("tensorrt", ())))
    found = rows["adapter graph float32 in tensorrt, usual 8x32"].found
    assert "; no CUDA graph: cuStreamEndCapture failed" in found
    assert trt.cuda.captured is None
    assert trt.cuda.memory == {}


# latency


def test_latency_is_of_one_inference_and_throughput_of_many() -> None:
    """A device that takes 2 ms for each inference when it is awaited, 10 ms for one in fifty."""
    begun: list[int] = []

    def wait() -> None:
        sleep(sum(0.01 if number % 50 == 49 else 0.002 for number in begun[-1:]))

    found = latency(lambda: begun.append(len(begun)), wait, 8, times=50)
    assert len(begun) == requests.WARM_UP + 2 * 50
    assert 0.002 <= found.median < 0.009
    assert found.p99 > 0.006
    assert found.rows_a_second > 8 / 0.002  # set off without waiting for each


def corner(rows: int) -> Case:
    return Case(name="usual", batch={"x": np.zeros((rows, 3))})


def request(capture: Any) -> Any:
    @contextmanager
    def ask(batch: Any) -> Iterator[Request]:
        yield Request(start=lambda: None, wait=lambda: None, capture=capture)

    return ask


@pytest.mark.parametrize(
    "error", [RuntimeError("illegal while capturing"), cuda.CudaError("illegal while capturing"),
              ProofError("illegal while capturing", fix="none")],
)  # fmt: skip
def test_what_cannot_be_captured_is_still_timed(error: Exception) -> None:
    def capture() -> Any:
        raise error

    [row] = gpu_latency.latencies("x", request(capture), [corner(2)])
    assert (row.status, row.what) == (MEASURED, "x, usual 2x3")
    assert row.found.endswith("rows/s; no CUDA graph: illegal while capturing")
    assert "graph" not in row.numbers


def test_a_runtime_without_graphs_says_nothing_of_them() -> None:
    [row] = gpu_latency.latencies("x", request(None), [corner(2)])
    assert row.found.endswith(" rows/s")


def test_onnx_runtime_computes_bound_inputs_again_and_again() -> None:
    """What a request computes is what `run` gives, though inputs are bound once."""
    from tests.support.linear import LINEAR_X, linear_model

    runner = OnnxRunner(linear_model("float32"), device="cpu")
    wanted = runner.run({"x": LINEAR_X})["y"]
    seen = []
    session = runner._session

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(session, name)

        def run_with_iobinding(self, binding: Any) -> None:
            session.run_with_iobinding(binding)
            seen.append(binding.copy_outputs_to_cpu()[0])

    runner._session = Spy()
    with runner.request({"x": LINEAR_X}) as asked:
        asked.start()
        asked.start()
        asked.wait()
    assert len(seen) == 2
    for found in seen:
        assert np.array_equal(found, wanted)
