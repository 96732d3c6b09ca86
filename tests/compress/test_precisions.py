"""Training through a grid, and measuring each precision: `compress --for`."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import numpy as np
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import kilodelta
from kilodelta.cli import main
from kilodelta.compress import Options, compress
from kilodelta.compress.distill.precisions.wishes import CHOICES
from kilodelta.compress.training import train
from kilodelta.compress.training.attachment import Attachment
from kilodelta.compress.training.through_grid import TargetGrid, Way, Ways
from kilodelta.errors import CheckpointError, InputError, QualityError
from kilodelta.files import safetensors
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Lora, UniLora
from kilodelta.grid import Matrix, open_quantised
from kilodelta.grid.codes import E2M1, E4M3, Kind, integer_kind
from kilodelta.grid.dequantise import dequantised
from kilodelta.grid.precisions import PRECISIONS
from kilodelta.grid.quantise import quantise_folder
from kilodelta.grid.reference import new_code
from kilodelta.merging.rebase import rebase
from kilodelta.progress import Event
from tests.support import pico

OPTIONS = Options(method=Lora(rank=2), steps=8, batch=16, rate=2e-2)


def is_linear(name: str) -> bool:
    return name.endswith(".weight") and ("dense" in name or ".self." in name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its quantised copy, a fine-tune, and texts."""
    place = tmp_path_factory.mktemp("precisions")
    base = pico.bert(place / "base", width=32, inner=32, layers=1)
    pico.tuned(base, place / "tuned", size=0.1)
    quantise_folder(base, place / "int4", "int4-g32", is_linear)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, place / "int4")
    words = pico.WORDS.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 4 + i % 5)) for i in range(96)]
    (place / "texts.txt").write_text("\n".join(lines) + "\n")
    return place


def distilled(place: Path, base: str, out: Path, **options: Any) -> Any:
    return compress(
        place / base,
        place / "tuned",
        out,
        inputs=place / "texts.txt",
        options=replace(OPTIONS, **options),
        force=True,
    )


def as_floats(folder: Path, out: Path, like: Path, add: kilodelta.Delta | None = None) -> Path:
    """A folder of float32 with the exact values of a quantised one, plus the updates of `add`."""
    out.mkdir()
    tensors = dequantised(open_quantised(folder))
    if add is not None:
        for name in add.targets:
            tensors[name] = RawTensor.of(tensors[name].values() + add.update(name))
    safetensors.write(out / "model.safetensors", tensors)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(like / name, out)
    return out


def measured(place: Path, merged: Path) -> float:
    """The agreement of a model on disk with the tuned one, on the same held-out texts: that of the
    base of another compression."""
    before = compress(
        merged,
        place / "tuned",
        merged.parent / f"{merged.name}.kd",
        inputs=place / "texts.txt",
        options=replace(OPTIONS, steps=2),
    ).before
    assert before is not None
    return before.agreement


def merged_in_grid(place: Path, quantised: Path, file: Path, room: Path) -> Path:
    """Merge a file for a quantised base, and return the result as floats."""
    kilodelta.merge(quantised, file, room / "merged", min_changed=0)
    return as_floats(room / "merged", room / "in-grid", place / "base")


def test_a_float_base_is_measured_as_each_merged_model_is(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "task.kd"
    report = distilled(place, "base", file, precisions=("fp16", "int4-g32"))
    found = {one.name: one for one in report.fidelity}
    assert list(found) == ["fp16", "int4-g32", "int4-g32.beside"]
    rebase(place / "int4", file, tmp_path / "int4.kd")
    floats = merged_in_grid(place, place / "int4", tmp_path / "int4.kd", tmp_path)
    assert found["int4-g32"].agreement == pytest.approx(measured(place, floats), abs=1e-6)
    delta = kilodelta.load(file, base=place / "base")
    beside = as_floats(place / "int4", tmp_path / "beside", place / "base", delta)
    assert found["int4-g32.beside"].agreement == pytest.approx(measured(place, beside), abs=1e-6)
    made, rebased = delta.manifest.made, kilodelta.load(tmp_path / "int4.kd").manifest.made
    assert made["agreement.int4-g32"] == round(found["int4-g32"].agreement, 4)
    assert made["codes_changed.int4-g32"] == rebased["grid_codes_changed"]
    assert found["fp16"].agreement == pytest.approx(report.after.agreement, abs=1e-3)
    assert found["int4-g32"].agreement != found["int4-g32.beside"].agreement


def test_a_quantised_base_is_measured_both_ways(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "task.kd"
    report = distilled(place, "int4", file)
    found = {one.name: one.agreement for one in report.fidelity}
    assert list(found) == ["in-grid", "beside"]
    assert report.after.agreement == found["in-grid"]
    delta = kilodelta.load(file, base=place / "int4")
    assert delta.manifest.grid is not None
    assert delta.manifest.base.name == "int4"
    floats = merged_in_grid(place, place / "int4", file, tmp_path)
    assert found["in-grid"] == pytest.approx(measured(place, floats), abs=1e-6)
    beside = as_floats(place / "int4", tmp_path / "beside", place / "base", delta)
    assert found["beside"] == pytest.approx(measured(place, beside), abs=1e-6)
    made = delta.manifest.made
    assert made["agreement.in-grid"] == made["agreement"] == round(found["in-grid"], 4)
    assert 0.01 < float(made["grid_codes_changed"]) < 1
    shown = CliRunner().invoke(main, ["inspect", str(file)]).output
    assert f"in-grid: agreement {made['agreement.in-grid']}" in shown
    table = json.loads(CliRunner().invoke(main, ["inspect", str(file), "--json"]).output)
    assert table["fidelity"]["beside"] == {"agreement": made["agreement.beside"]}
    assert table["fidelity"]["in-grid"]["codes_changed"] == made["grid_codes_changed"]


def test_training_through_the_grid_changes_the_outcome(place: Path, tmp_path: Path) -> None:
    """A change below half a step: trained beside the base it rounds away, trained through the grid
    it moves codes, and the merged model comes nearer to the tuned one."""
    for name in ("base", "int4", "texts.txt"):
        (tmp_path / name).symlink_to(place / name)
    pico.tuned(place / "base", tmp_path / "tuned", size=0.02)
    options = {"steps": 40, "rate": 5e-3}
    through = distilled(tmp_path, "int4", tmp_path / "a.kd", precisions=("in-grid",), **options)
    distilled(tmp_path, "int4", tmp_path / "b.kd", precisions=("beside",), **options)
    floats = merged_in_grid(tmp_path, place / "int4", tmp_path / "b.kd", tmp_path)
    assert through.after.agreement > measured(tmp_path, floats) + 0.003
    assert through.after.agreement > through.before.agreement + 0.01


def grid(kind: Kind, seed: int, *, zeros: bool, minima: bool, order: bool, block: int) -> Matrix:
    rng = np.random.default_rng(seed)
    shape = (5, -(-48 // block))
    steps = rng.normal(size=shape).astype(np.float16).astype(np.float64)
    steps[1, 0] = 0
    codes = rng.integers(kind.low, kind.high + 1, (5, 48)) if not kind.is_float else None
    if codes is None:
        codes = rng.integers(0, 1 << kind.bits, (5, 48))
        codes[kind.integers(codes) == np.iinfo(np.int32).max] = 0
    return Matrix(
        kind=kind,
        codes=codes.astype(kind.dtype),
        steps=steps,
        block=(1, block),
        zeros=rng.integers(-4, 4, shape).astype(np.int16) if zeros else None,
        minima=rng.normal(size=shape).astype(np.float16).astype(np.float64) if minima else None,
        order=rng.integers(0, shape[1], 48).astype(np.int32) if order else None,
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (integer_kind(4), {"zeros": False, "minima": False, "order": False, "block": 16}),
        (integer_kind(4), {"zeros": True, "minima": False, "order": True, "block": 16}),
        (integer_kind(8), {"zeros": True, "minima": True, "order": False, "block": 20}),
        (E2M1, {"zeros": False, "minima": False, "order": False, "block": 16}),
        (E4M3, {"zeros": False, "minima": False, "order": False, "block": 48}),
    ],
    ids=["int4", "act-order", "minima, cut block", "e2m1", "e4m3"],
)
def test_the_forward_pass_is_the_merge_in_the_grid(kind: Kind, options: dict[str, Any]) -> None:
    """Against plain fractions, for updates that are no ties in float32."""
    from fractions import Fraction

    base = grid(kind, 3, **options)
    update = np.random.default_rng(4).normal(size=base.shape).astype(np.float32) * 2
    weight = torch.from_numpy(base.values().astype(np.float32))
    change = torch.from_numpy(update).requires_grad_()
    out = TargetGrid.of(base).merged(weight, change)
    codes = base.codes.copy()
    for i, j in np.ndindex(base.shape):
        g = base.groups[j]
        zero = 0 if base.zeros is None else int(base.zeros[i, g])
        wanted = Fraction(float(update[i, j]))
        codes[i, j] = new_code(kind, int(base.codes[i, j]), zero, float(base.steps[i, g]), wanted)
    exact = replace(base, codes=codes).values()
    np.testing.assert_allclose(out.detach().numpy(), exact, rtol=2e-6, atol=1e-6)
    assert (codes != base.codes).any()
    gradient = torch.randn(base.shape)
    (straight,) = torch.autograd.grad(out, change, gradient)
    assert torch.equal(straight, gradient)


def test_min_agreement_holds_in_every_precision(place: Path, tmp_path: Path) -> None:
    with pytest.raises(QualityError, match=r"in int4-g32, below 0\.9999"):
        distilled(
            place,
            "base",
            tmp_path / "task.kd",
            precisions=("int4-g32",),
            min_agreement=0.9999,
            steps=2,
        )
    assert (tmp_path / "task.kd").exists()


@pytest.mark.parametrize(
    ("base", "asked", "what", "fix"),
    [
        ("base", ("int3",), "'int3' is no precision", ", ".join(CHOICES)),
        ("base", ("fp8", "fp8"), "names fp8 twice", "once"),
        ("base", ("in-grid", "fp8"), "in-grid is a way .* fp8 a precision", "as BASE is"),
        ("base", ("in-grid",), "base is a float model", "int4-g32"),
        ("int4", ("fp16",), "int4 is quantised already .*pack-quantized", "beside,in-grid"),
        ("base", ("int4-g64",), "encoder.layer.0.*cannot be quantised to int4-g64", "leave it out"),
    ],
)
def test_what_cannot_be_asked_for(
    place: Path, tmp_path: Path, base: str, asked: tuple[str, ...], what: str, fix: str
) -> None:
    with pytest.raises(InputError, match=what) as caught:
        distilled(place, base, tmp_path / "task.kd", precisions=asked)
    assert fix in caught.value.fix
    assert not (tmp_path / "task.kd").exists()


def test_a_precision_needs_inputs(place: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, precisions=("int4-g32",))
    with pytest.raises(InputError, match="measured on inputs"):
        compress(place / "base", place / "tuned", tmp_path / "task.kd", options=options)


def test_float16_refuses_a_weight_beyond_its_range(place: Path, tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        shutil.copytree(place / name, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        tensors["pooler.dense.bias"][0] = 70000
        save_file(tensors, file, {"format": "pt"})
    (tmp_path / "texts.txt").write_text((place / "texts.txt").read_text())
    with pytest.raises(InputError, match=r"pooler\.dense\.bias holds 70000, beyond float16"):
        distilled(tmp_path, "base", tmp_path / "task.kd", precisions=("fp16",))


def test_a_quantised_base_without_inputs_is_fitted_to_its_weights(
    place: Path, tmp_path: Path
) -> None:
    options = replace(OPTIONS, rate=None)
    report = compress(place / "int4", place / "tuned", tmp_path / "task.kd", options=options)
    assert report.fidelity == ()
    assert kilodelta.load(tmp_path / "task.kd").manifest.grid is not None
    assert kilodelta.merge(place / "int4", tmp_path / "task.kd", tmp_path / "out").codes_changed


def test_nothing_is_left_of_the_values_of_a_quantised_base(place: Path, tmp_path: Path) -> None:
    distilled(place, "int4", tmp_path / "task.kd", steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["task.kd"]


def test_codes_cannot_be_stored_whole(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stored as codes"):
        distilled(place, "int4", tmp_path / "task.kd", targets=("*.query.weight",), extras="all")


def test_a_damaged_scale_is_named(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "int4", tmp_path / "int4")
    file = tmp_path / "int4" / "model.safetensors"
    tensors = load_file(file)
    tensors["pooler.dense.weight_scale"][0, 0] = float("nan")
    save_file(tensors, file)
    options = replace(OPTIONS, rate=None)
    with pytest.raises(CheckpointError, match=r"pooler\.dense\.weight: the scale .* nan"):
        compress(tmp_path / "int4", place / "tuned", tmp_path / "task.kd", options=options)
    assert not (tmp_path / "task.kd").exists()


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_run_goes_on_with_its_ways(place: Path, tmp_path: Path) -> None:
    distilled(place, "int4", tmp_path / "whole.kd")

    def stop(event: Event) -> None:
        if event.stage == "distil" and event.done == 5:  # the next step is one beside the base
            signal.raise_signal(signal.SIGINT)

    cut = compress(
        place / "int4",
        place / "tuned",
        tmp_path / "cut.kd",
        inputs=place / "texts.txt",
        options=OPTIONS,
        progress=stop,
    )
    assert cut.interrupted

    def resume(options: Options) -> None:
        compress(
            place / "int4",
            place / "tuned",
            tmp_path / "cut.kd",
            inputs=place / "texts.txt",
            options=options,
            resume=True,
        )

    with pytest.raises(InputError, match="other --for"):
        resume(replace(OPTIONS, precisions=("beside",)))
    resume(OPTIONS)
    assert (tmp_path / "cut.kd").read_bytes() == (tmp_path / "whole.kd").read_bytes()


def test_updates_begin_at_a_share_of_the_grids_steps() -> None:
    """Far below half a step, updates change no code, and what they learn is lost in the grid."""
    attachment = on_grids(UniLora(rank=4, bases=4000))
    attachment.start_on_grid(0.25)
    steps = [float(grid.steps.mean()) for grid in attachment.ways.all[0].grids.values()]
    assert steps[0] > 2 * steps[1]  # of 0.06 and 0.02, the mean of which the third begins with
    for index, step in enumerate((*steps, sum(steps) / 2)):
        size = attachment.update(index).matrix().square().mean().sqrt().item()
        assert size == pytest.approx(0.25 * step, rel=1e-5)


def test_updates_that_begin_at_zero_do_so_in_a_grid() -> None:
    attachment = on_grids(Lora(rank=2))
    attachment.start_on_grid(0.25)
    assert not any(attachment.update(index).matrix().any() for index in range(3))


def test_every_other_step_goes_through_a_grid() -> None:
    grids = {0: TargetGrid.of(PRECISIONS["int4-g32"].make(np.eye(32)))}
    int4, nvfp4 = (Way(name=name, grids=grids) for name in ("int4-g32", "nvfp4"))
    a, b, c = (Way(name=name) for name in ("float", "int4-g32.beside", "nvfp4.beside"))
    five = Ways((a, int4, b, nvfp4, c))
    assert [five.at(step) for step in range(6)] == [int4, a, nvfp4, b, int4, c]
    assert [Ways((int4, nvfp4)).at(step) for step in range(3)] == [int4, nvfp4, int4]
    assert [Ways((a, b)).at(step) for step in range(3)] == [a, b, a]
    assert Ways().at(0) is None


def on_grids(method: Any) -> Attachment:
    """Attach a method to three layers, the first two of which train through a grid as well."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 96), nn.Linear(96, 32), nn.Linear(32, 48)]
    with torch.no_grad():
        layers[0].weight.mul_(3)
    weights = [layer.weight.detach().double().numpy() for layer in layers[:2]]
    attachment = train.attached(train.attach(nn.Sequential(*layers), method, "*.weight"))
    matrices = [PRECISIONS["int4-g32"].make(weight) for weight in weights]
    grids = {index: TargetGrid.of(matrix) for index, matrix in enumerate(matrices)}
    attachment.ways = Ways((Way(name="in-grid", grids=grids), Way(name="beside")))
    return attachment
