"""Parity on a small classifier: what is right passes, and every kind of wrong is told apart."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.errors import MissingPackageError, ProofError
from kilodelta.verify.parity.bisect import first_departure, stops_of
from kilodelta.verify.parity.cases import cases
from kilodelta.verify.parity.judge import judge
from kilodelta.verify.parity.reference import Reference
from kilodelta.verify.parity.report import Report
from kilodelta.verify.parity.result import Result
from kilodelta.verify.runners.onnx_runner import OnnxRunner
from kilodelta.verify.runners.runner import Arrays, Batch
from kilodelta.verify.runners.tensorrt_runner import TensorrtRunner
from kilodelta.verify.runners.torch_runner import TorchRunner

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

WORDS, WIDTH, CLASSES = 40, 16, 5
PROFILE = {
    "input_ids": ((1, 1), (3, 7), (8, 12)),
    "attention_mask": ((1, 1), (3, 7), (8, 12)),
}


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.down = torch.nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        change: torch.Tensor = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return x + change


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(WORDS, WIDTH)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.head = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        mask = attention_mask[..., None].to(x.dtype)
        pooled = (x * mask).sum(1) / mask.sum(1)
        return {"logits": self.head(pooled), "hidden": x}


def with_update(base: Classifier, size: float) -> Classifier:
    """The base plus a rank-1 update of every up projection, `size` times as large."""
    merged = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    for name, weight in merged.state_dict().items():
        if not name.endswith("up.weight"):
            continue
        left = torch.randn(len(weight), 1, generator=generator)
        right = torch.randn(1, weight.shape[1], generator=generator)
        weight += size * weight.norm() / (left @ right).norm() * (left @ right)
    return merged


def to_onnx(module: torch.nn.Module, path: Path, precision: str = "float32") -> Path:
    """Export with every parameter under its own name and layout."""
    module = copy.deepcopy(module).to(getattr(torch, precision)).eval()
    ids = torch.ones(2, 4, dtype=torch.int64)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("sequence", max=64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            (ids, ids.clone()),
            dynamo=True,
            optimize=False,
            dynamic_shapes=(sizes, sizes),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits", "hidden"],
            verbose=False,
        )
    assert program is not None
    program.save(str(path))
    return path


class World:
    """A base, its fine-tune, their reference, and files made from the fine-tune."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.base = Classifier().eval()
        self.merged = with_update(self.base, 0.1)
        self.reference = self.reference_of(self.merged)
        self.folder = folder
        self.file = to_onnx(self.merged, folder / "model.onnx")
        self.half = to_onnx(self.merged, folder / "half.onnx", "float16")

    def reference_of(self, merged: Classifier) -> Reference:
        return Reference(
            merged,
            self.base,
            outputs=("logits", "hidden"),
            scores=("logits",),
            cases=cases(inputs(), PROFILE),
        )

    def judge(self, path: Path, precision: str = "float32") -> Result:
        return judge(
            OnnxRunner(path, device="cpu"),
            self.reference,
            artefact=path.name,
            precision=precision,
            locate=lambda case: first_departure(path, self.merged, case.batch, precision=precision),
        )

    def edited(self, name: str, edit: Callable[[Any], Any]) -> Path:
        """A copy of the float32 file with one initializer changed."""
        model = onnx.load(str(self.file))
        tensor = next(t for t in model.graph.initializer if t.name == name)
        changed = edit(onnx.numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(onnx.numpy_helper.from_array(changed, name))
        path = self.folder / f"{name}.onnx"
        onnx.save(model, str(path))
        return path


def inputs() -> Batch:
    """Five rows of 3 to 7 tokens, padded to 8."""
    rng = np.random.default_rng(0)
    mask = (np.arange(8) < rng.integers(3, 8, size=(5, 1))).astype(np.int64)
    return {
        "input_ids": rng.integers(1, WORDS, size=(5, 8)) * mask,
        "attention_mask": mask,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("parity"))


def test_a_right_file_passes_at_all_three_shapes(world: World) -> None:
    result = world.judge(world.file)
    assert result.status == "passed", result.reasons()
    shapes = [(check.output, check.case, check.shape) for check in result.checks]
    points = [("smallest", (1, 1)), ("usual", (3, 7)), ("largest", (8, 12))]
    assert shapes == [(o, name, shape) for o in ("logits", "hidden") for name, shape in points]
    # The update's effect is about 1 % of the outputs, float32 noise 1e-7 of them.
    assert result.update == pytest.approx({"logits": 1.0, "hidden": 1.0}, abs=1e-4)
    assert all(check.error.top1 == 1.0 for check in result.checks if check.output == "logits")
    assert all(check.error.kl is None for check in result.checks if check.output == "hidden")


def test_float16_passes_its_own_gate(world: World) -> None:
    result = world.judge(world.half, "float16")
    assert result.status == "passed", result.reasons()


def test_float16_that_claims_float32_fails(world: World) -> None:
    result = world.judge(world.half, "float32")
    assert result.status == "failed"
    assert not any(check.passed for check in result.checks)


def test_bfloat16_that_claims_float16_fails(world: World) -> None:
    coarse = TorchRunner(world.merged, world.reference.outputs, precision="bfloat16", device="cpu")
    result = judge(coarse, world.reference, artefact="coarse", precision="float16")
    assert result.status == "failed"


def test_a_wrong_weight_fails_and_is_named(world: World) -> None:
    def nudge(weight: Any) -> Any:
        weight[3, 5] += 0.01
        return weight

    result = world.judge(world.edited("blocks.1.up.weight", nudge))
    assert result.status == "failed"
    assert result.departure is not None
    assert result.departure.layer == "blocks.1.up"
    assert "first off at blocks.1.up (node " in str(result.departure)
    # One weight is wrong, not the update as a whole.
    assert all(share > 0.5 for share in result.update.values())


def test_a_wrong_norm_is_named(world: World) -> None:
    result = world.judge(world.edited("blocks.2.norm.weight", lambda weight: weight[::-1] + 1))
    assert result.departure is not None
    assert result.departure.layer == "blocks.2.norm"


def test_a_layer_is_named_as_the_file_names_it(world: World) -> None:
    """A checkpoint may call tensors otherwise than the module does."""
    model = onnx.load(str(world.edited("blocks.1.up.bias", lambda bias: bias + 1)))
    names = {f"encoder.{t.name}": t.name for t in model.graph.initializer}
    for tensor in model.graph.initializer:
        tensor.name = f"encoder.{tensor.name}"
    for node in model.graph.node:
        node.input[:] = [f"encoder.{n}" if f"encoder.{n}" in names else n for n in node.input]
    onnx.save(model, str(world.folder / "renamed.onnx"))
    found = first_departure(
        world.folder / "renamed.onnx",
        world.merged,
        world.reference.cases[1].batch,
        precision="float32",
        names=names,
    )
    assert found is not None
    assert found.layer == "encoder.blocks.1.up"


def test_the_base_in_place_of_the_merged_model_fails(world: World) -> None:
    result = world.judge(to_onnx(world.base, world.folder / "base.onnx"))
    assert result.status == "failed"
    assert result.update == pytest.approx({"logits": 0.0, "hidden": 0.0}, abs=1e-4)
    assert result.reasons()[-1].endswith("is present: these are the base's outputs")
    assert result.departure is not None
    assert result.departure.layer == "blocks.0.up"


def test_an_update_below_the_noise_is_still_seen(world: World) -> None:
    """In float16 a tiny update hides below the gate, but not from the projection."""
    merged = with_update(world.base, 2e-3)
    reference = world.reference_of(merged)
    statuses = {}
    for name, module in (("merged", merged), ("base", world.base)):
        runner = TorchRunner(module, reference.outputs, precision="float16", device="cpu")
        result = judge(runner, reference, artefact=name, precision="float16")
        assert all(check.passed for check in result.checks)
        statuses[name] = result.status
    assert statuses == {"merged": "passed", "base": "failed"}


def test_an_update_without_effect_proves_nothing(world: World) -> None:
    with pytest.raises(ProofError, match="give the same outputs on these inputs"):
        world.reference_of(copy.deepcopy(world.base))


class Fixed:
    """A runner that gives what it is told to."""

    name = "fixed"

    def __init__(self, answer: Callable[[Batch], Arrays]) -> None:
        self.run = answer

    def available(self) -> None:
        return None


def test_nan_fails(world: World) -> None:
    def one_nan(batch: Batch) -> Arrays:
        out = TorchRunner(
            world.merged, world.reference.outputs, precision="float64", device="cpu"
        ).run(batch)
        out["logits"][0, 0] = np.nan
        return out

    result = judge(Fixed(one_nan), world.reference, artefact="nan", precision="float32")
    assert result.status == "failed"
    assert "relative L2 inf" in result.reasons()[0]
    assert result.update["logits"] == pytest.approx(1.0, abs=0.1)  # of what is finite


def test_what_torch_cannot_compute_is_no_failure(world: World) -> None:
    """Without a yardstick nothing can be said about the artefact."""

    class NoHalf(Classifier):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            if self.head.weight.dtype == torch.float16:
                raise RuntimeError("\"mystery_kernel\" not implemented for 'Half'")
            return super().forward(input_ids, attention_mask)

    module = NoHalf().eval()
    module.load_state_dict(world.merged.state_dict())
    runner = OnnxRunner(world.half, device="cpu")
    result = judge(runner, world.reference_of(module), artefact="half", precision="float16")
    assert result.status == "not run"
    assert "torch on cpu cannot compute in float16" in result.reasons()[0]


def test_a_missing_output_is_a_failure(world: World) -> None:
    runner = Fixed(lambda batch: {"logits": np.zeros((1, 1))})
    result = judge(runner, world.reference, artefact="short", precision="float32")
    assert result.status == "failed"
    assert result.reasons() == ("the artefact has no output hidden; it has logits",)


def test_what_cannot_run_is_reported(world: World, tmp_path: Path) -> None:
    runner = TensorrtRunner(tmp_path / "model.engine", flavour="tensorrt")
    if runner.available() is None:
        pytest.skip("TensorRT is installed")
    result = judge(runner, world.reference, artefact="model.engine", precision="float32")
    assert result.status == "not run"
    passed = world.judge(world.file)
    assert Report(results=(passed, result)).failure() is None
    [table] = Report(results=(result,)).tables()
    assert table.rows[0][:2] == ("tensorrt", "not run")
    assert table.rows[0][2].startswith("tensorrt is not installed")
    assert table.rows[0][3] == "model.engine"


def test_what_is_required_must_run(world: World, tmp_path: Path) -> None:
    engine = TensorrtRunner(tmp_path / "model.engine", flavour="tensorrt")
    if engine.available() is None:
        pytest.skip("TensorRT is installed")
    missing = judge(engine, world.reference, artefact="model.engine", precision="float32")
    results = (world.judge(world.file), missing)
    assert Report(results=results, required=("ort",)).passed
    failure = Report(results=results, required=("ort", "tensorrt")).failure()
    assert isinstance(failure, MissingPackageError)
    assert failure.fix == "in a clone of kilodelta: pip install '.[tensorrt]'"
    absent = Report(results=results, required=("ort-cuda",)).failure()
    assert isinstance(absent, ProofError)
    assert "there is nothing for it to run" in absent.what


def test_a_failure_names_everything_and_the_json_is_strict(world: World) -> None:
    report = Report(results=(world.judge(world.half, "float32"),))
    failure = report.failure()
    assert isinstance(failure, ProofError)
    assert "half.onnx in onnxruntime-cpu (float32): logits at the smallest shape 1x1" in str(
        failure
    )
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["passed"] is False
    assert found["results"][0]["departure"]["layer"] == "words"
    assert {len(row) for row in report.tables()[0].rows} == {len(report.tables()[0].columns)}


def test_bisecting_a_right_file_finds_nothing(world: World) -> None:
    batch = world.reference.cases[1].batch
    assert first_departure(world.file, world.merged, batch, precision="float32") is None


def test_a_weight_may_be_transposed_first() -> None:
    helper = onnx.helper
    graph = SimpleNamespace(
        initializer=[SimpleNamespace(name="fc.weight"), SimpleNamespace(name="fc.bias")],
        node=[
            helper.make_node("Transpose", ["fc.weight"], ["t"], name="turn"),
            helper.make_node("MatMul", ["x", "t"], ["xw"], name="product"),
            helper.make_node("Relu", ["xw"], ["r"], name="relu"),
            helper.make_node("Add", ["r", "fc.bias"], ["y"], name="sum"),
        ],
    )
    found = [(stop.layer, stop.node, stop.value) for stop in stops_of(graph)]
    assert found == [("fc", "product", "xw"), ("fc", "sum", "y")]


def test_every_layer_is_a_stop(world: World) -> None:
    stops = {stop.layer for stop in stops_of(onnx.load(str(world.file)).graph)}
    inner = {f"blocks.{i}.{layer}" for i in range(3) for layer in ("norm", "up", "down")}
    assert stops >= {"words", "head", *inner}
