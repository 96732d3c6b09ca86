"""Our own quantiser: against scalar fractions, and read back from what it writes."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import kilodelta
from kilodelta.cli import main
from kilodelta.errors import CheckpointError, InputError, OutputError
from kilodelta.files import safetensors
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid import open_quantised, quantise
from kilodelta.grid.codes import E2M1, E4M3, integer_kind
from kilodelta.grid.dequantise import dequantised
from kilodelta.grid.dequantise import float_folder as float_folder_of
from kilodelta.grid.precisions import PRECISIONS, nearest_codes, with_steps
from kilodelta.grid.quantise import needs_of_copy, quantise_folder
from kilodelta.grid.reference import new_code
from kilodelta.merging.build import Recipe, build, quantise_target
from kilodelta.merging.rebase import rebased
from tests.support import grids
from tests.support.disks import with_free

RNG = np.random.default_rng(5)
WEIGHT = (RNG.normal(size=(24, 128)) / 20).astype(np.float32)
WEIGHT[3, :32] = 0


def float_folder(place: Path, dtype: Any = np.float32) -> Path:
    tensors = {
        "a.weight": WEIGHT.astype(dtype),
        "b.weight": -WEIGHT[:16].astype(dtype),
        "norm.weight": np.ones(8, np.float32),
    }
    return grids.folder(place, None, tensors)


def chosen(name: str) -> bool:
    return name.startswith(("a", "b"))


@pytest.mark.parametrize("kind", [integer_kind(4), E2M1, E4M3], ids=lambda kind: str(kind.name))
def test_codes_are_nearest_by_fractions(kind: Any) -> None:
    # With every tie of E2M1 and of the integers among them.
    quotients = np.concatenate([RNG.normal(size=300) * 4, np.arange(-40, 41) / 4, [1e9, -1e9, 500]])
    found = nearest_codes(kind, quotients)
    wanted = [new_code(kind, 0, 0, 1.0, Fraction(float(q))) for q in quotients]
    assert found.tolist() == wanted


@pytest.mark.parametrize("text", ["{", "\ufeff{'a'}", "[" * 100_000, '{"a": ' + "9" * 9999 + "}"])
def test_a_damaged_configuration_is_a_sentence(tmp_path: Path, text: str) -> None:
    base = float_folder(tmp_path / "base")
    (base / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        quantise_folder(base, tmp_path / "out", next(iter(PRECISIONS)), chosen)
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json is a pipe"):
        quantise_folder(base, tmp_path / "out", next(iter(PRECISIONS)), chosen)


def test_what_lies_beside_the_weights_comes_along(tmp_path: Path) -> None:
    # Read by whatever opens the model by name: a tokenizer, the pooling of a sentence encoder.
    base = float_folder(tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    (base / "outside").symlink_to(tmp_path)
    quantise_folder(base, tmp_path / "q", "fp8", chosen)
    with float_folder_of(open_quantised(tmp_path / "q")) as floats:
        for folder in (tmp_path / "q", floats):
            assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) == [
                "1_Pooling", "1_Pooling/config.json", "config.json", "model.safetensors",
                "tokenizer.json",
            ]  # fmt: skip


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_folder_reads_back_as_it_was_made(tmp_path: Path, precision: str, dtype: Any) -> None:
    base = float_folder(tmp_path / "base", dtype)
    assert quantise_folder(base, tmp_path / "q", precision, chosen) == 2
    model = open_quantised(tmp_path / "q")
    values = WEIGHT.astype(dtype).astype(np.float64)
    made, found = PRECISIONS[precision].make(values), model.matrix("a.weight")
    assert np.array_equal(found.values(), made.values())
    assert np.array_equal(found.codes, made.codes)
    assert np.array_equal(found.steps, made.steps)
    step = np.abs(found.spread(found.steps)).max()
    # Half the largest gap (E4M3: 32, E2M1: 2, integers: 1), and what a rounded scale cuts off:
    # 2^-4 of six steps in E4M3, 2^-24 of the largest in float32.
    limit = {"fp8": 16.001, "nvfp4": 1.375}.get(precision, 0.501)
    assert np.abs(found.values() - values).max() <= limit * step
    floats = dequantised(model)
    assert np.array_equal(floats["a.weight"].values(), found.values().astype(np.float32))
    assert floats["norm.weight"].dtype == "F32"


def test_steps_are_those_of_the_text() -> None:
    values = WEIGHT.astype(np.float64)
    int4 = PRECISIONS["int4-g32"].make(values)
    assert int4.steps[5, 1] == float(np.float32(np.abs(values[5, 32:64]).max() / 7))
    assert int4.steps[3, 0] == 0
    assert not int4.codes[3, :32].any()
    fp8 = PRECISIONS["fp8"].make(values)
    assert fp8.steps.tolist() == [[float(np.float32(np.abs(values).max() / 448))]]
    nvfp4 = PRECISIONS["nvfp4"].make(values)
    whole = 2.0 ** np.ceil(np.log2(np.abs(values).max() / (6 * 448)))
    scale = np.float64(np.abs(values[5, 16:32]).max() / 6 / whole).astype(ml_dtypes.float8_e4m3fn)
    assert nvfp4.steps[5, 1] == float(scale) * whole


@pytest.mark.parametrize("precision", ["int4-g32", "fp8"])
def test_scales_are_float16_where_they_are_asked_for(tmp_path: Path, precision: str) -> None:
    base = float_folder(tmp_path / "base")
    quantise_folder(base, tmp_path / "q", precision, chosen, scales="float16")
    model = open_quantised(tmp_path / "q")
    assert model.parts("a.weight")["weight_scale"].dtype == "F16"
    found, values = model.matrix("a.weight"), WEIGHT.astype(np.float64)
    largest = np.abs(values[5, 32:64]).max() / 7 if precision == "int4-g32" else None
    if largest:
        assert found.steps[5, 1] == float(np.float16(largest))
    assert np.array_equal(found.codes, with_steps(found, values).codes)  # of the rounded scales
    assert not np.array_equal(found.steps, PRECISIONS[precision].make(values).steps)


def test_scales_that_are_none_or_too_large_are_refused(tmp_path: Path) -> None:
    base = grids.folder(tmp_path / "base", None, {"a.weight": np.full((2, 32), 1e6, np.float32)})
    for scales, said in (("float64", "'float64' is no type"), ("float16", "a.weight needs scales")):
        with pytest.raises(InputError, match=said):
            quantise_folder(base, tmp_path / "q", "int4-g32", lambda _: True, scales=scales)
        assert not (tmp_path / "q").exists()
    assert quantise_folder(base, tmp_path / "q", "int4-g32", lambda _: True) == 1


def test_a_quantised_model_is_quantised_anew_from_its_values(tmp_path: Path) -> None:
    base = float_folder(tmp_path / "base")
    quantise_folder(base, tmp_path / "fp8", "fp8", chosen)
    quantise_folder(tmp_path / "fp8", tmp_path / "int4", "int4-g32", "a.weight".__eq__)
    first, second = open_quantised(tmp_path / "fp8"), open_quantised(tmp_path / "int4")
    floats = first.matrix("a.weight").values().astype(np.float32)
    wanted = PRECISIONS["int4-g32"].make(floats.astype(np.float64))
    assert np.array_equal(second.matrix("a.weight").values(), wanted.values())
    kept = first.matrix("b.weight").values().astype(np.float32)
    assert np.array_equal(second.plain_raw("b.weight").values(), kept)


def test_both_spellings_of_our_nvfp4_are_one_model(tmp_path: Path) -> None:
    quantise_folder(float_folder(tmp_path / "base"), tmp_path / "q", "nvfp4", chosen)
    model = open_quantised(tmp_path / "q")
    tensors: dict[str, Any] = {}
    for name in ("a", "b"):
        parts = model.parts(f"{name}.weight")
        tensors[f"{name}.weight"] = parts["weight_packed"].values()
        scales = parts["weight_scale"].values()
        tensors[f"{name}.weight_scale"] = scales.view(ml_dtypes.float8_e4m3fn)
        tensors[f"{name}.weight_scale_2"] = 1 / parts["weight_global_scale"].values()
    other = grids.folder(tmp_path / "m", grids.MODELOPT, tensors)
    assert open_quantised(other).identity().root == model.identity().root


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantising_again_changes_nothing(precision: str) -> None:
    first = PRECISIONS[precision].make(WEIGHT.astype(np.float64))
    assert np.array_equal(with_steps(first, first.values()).values(), first.values())


@pytest.mark.parametrize(
    ("name", "value", "precision", "said"),
    [
        ("a.weight", np.ones((4, 33), np.float32), "int4-g32", "a multiple of 32 columns"),
        ("a.bias", np.ones(4, np.float32), "fp8", "a matrix of floats"),
        ("a.weight", np.ones((4, 32), np.int8), "fp8", "a matrix of floats"),
        ("a.weight", np.ones((4, 32), np.float32), "int3", "'int3' is no precision"),
    ],
)
def test_what_cannot_be_quantised(
    tmp_path: Path, name: str, value: Any, precision: str, said: str
) -> None:
    base = grids.folder(tmp_path / "base", None, {name: value})
    with pytest.raises(InputError, match=said):
        quantise_folder(base, tmp_path / "q", precision, lambda _: True)
    assert not (tmp_path / "q").exists()


def test_a_base_of_nan_is_refused(tmp_path: Path) -> None:
    base = grids.folder(tmp_path / "base", None, {"a.weight": np.full((4, 32), np.nan)})
    with pytest.raises(InputError, match="F64"):
        quantise_folder(base, tmp_path / "q", "fp8", lambda _: True)
    bad = grids.folder(tmp_path / "bad", None, {"a.weight": np.full((4, 32), np.float32(np.nan))})
    with pytest.raises(CheckpointError, match=r"a\.weight holds NaN"):
        quantise_folder(bad, tmp_path / "q", "fp8", lambda _: True)


@pytest.mark.parametrize("precision", ["int4-g32", "nvfp4", "fp8"])
def test_a_float_file_goes_into_the_grid(tmp_path: Path, precision: str) -> None:
    """Distilled for the float model, rebased, merged: the nearest codes to the float merge."""
    base, lora = float_folder(tmp_path / "base"), Lora(rank=2)
    rng = np.random.default_rng(4)
    values = {
        name: quantise_target(
            lora, {"A": rng.normal(size=(2, 128)) / 8, "B": rng.normal(size=(rows, 2)) / 8}, 8
        )
        for name, rows in (("a.weight", 24), ("b.weight", 16))
    }
    patterns = Patterns(include=("a.weight", "b.weight"))
    delta = build(base, Recipe(method=lora, patterns=patterns, name="tiny"), values)
    quantise_folder(base, tmp_path / "q", precision, chosen)
    on_grid, _ = rebased(delta, open_quantised(tmp_path / "q"))
    kilodelta.merge(tmp_path / "q", on_grid, tmp_path / "merged")
    old = open_quantised(tmp_path / "q").matrix("a.weight")
    new = open_quantised(tmp_path / "merged").matrix("a.weight")
    c, e = on_grid.scale("a.weight")
    exact = old.values() + np.ldexp(c * on_grid.expand("a.weight").astype(np.float64), e)
    assert np.array_equal(with_steps(old, exact).values(), new.values())


@pytest.mark.parametrize(
    ("precision", "scales"), [("int4-g32", "float16"), ("nvfp4", "float32"), ("fp8", "float16")]
)
def test_room_is_asked_for_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, scales: str
) -> None:
    base, made, again = float_folder(tmp_path / "base"), tmp_path / "q", tmp_path / "again"
    quantise_folder(base, made, precision, chosen, scales=scales)
    checkpoint = Checkpoint.open(made)
    written = sum(checkpoint.info(name).nbytes for name in checkpoint.names)
    needs = {
        base: needs_of_copy(Checkpoint.open(base), again, precision, chosen, scales),
        made: needs_of_copy(open_quantised(made), again, precision, chosen, scales),
    }
    assert written - 40 <= needs[base][0].nbytes <= written  # of each: shape, or global scale
    assert [need.nbytes for need in needs[made]] == [40 * 128 * 4 + 32, needs[base][0].nbytes]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr(quantise, "quantised_weight", never)
    for place, asked in needs.items():
        with_free(monkeypatch, sum(need.nbytes for need in asked) - 1)
        with pytest.raises(OutputError, match=f"the copy in {precision}"):
            quantise_folder(place, again, precision, chosen, scales=scales)
    assert not again.exists()


def test_a_folder_that_is_there_is_said_before_the_work(tmp_path: Path) -> None:
    base = float_folder(tmp_path / "base")
    quantise_folder(base, tmp_path / "q", "fp8", chosen)
    with pytest.raises(OutputError, match="exists already"):
        quantise_folder(tmp_path / "absent", tmp_path / "q", "fp8", chosen)


@pytest.mark.parametrize(
    ("norm", "said"), [(np.float32(1), False), (np.float16(1), False), (np.float32(2), True)]
)
def test_norms_into_which_a_quantiser_folded_scales_are_noted(
    tmp_path: Path, norm: Any, said: bool
) -> None:
    base = float_folder(tmp_path / "base")
    quantise_folder(base, tmp_path / "q", "fp8", chosen)
    weights = tmp_path / "q" / "model.safetensors"
    tensors = {name: Checkpoint.open(tmp_path / "q").raw(name) for name in
               Checkpoint.open(tmp_path / "q").names}  # fmt: skip
    weights.unlink()
    safetensors.write(weights, {**tensors, "norm.weight": RawTensor.of(np.full(8, norm))})
    values = {
        name: quantise_target(Lora(rank=1), {"A": np.ones((1, 128)), "B": np.ones((rows, 1))}, 8)
        for name, rows in (("a.weight", 24), ("b.weight", 16))
    }
    recipe = Recipe(method=Lora(rank=1), patterns=Patterns(include=("[ab].weight",)))
    build(base, recipe, values).save(tmp_path / "a.kd")
    command = ["rebase", str(tmp_path / "q"), str(tmp_path / "a.kd"), "-o", str(tmp_path / "b.kd")]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert ("not the float base's (norm.weight)" in " ".join(shown.output.split())) == said
