"""Which type a training multiplies in, where the user leaves it to kilodelta."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from kilodelta.compress import Options, compress, plan
from kilodelta.compress.distill import placement
from kilodelta.compress.distill.learn import suiting
from kilodelta.compress.distill.learn.steps import Run
from kilodelta.compress.distill.planning import estimate
from kilodelta.compress.training.products import narrowing
from kilodelta.errors import InputError
from tests.support import pico

Pair = tuple[Path, Path]


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with units for both types, on which layers of any size are large."""
    monkeypatch.setattr(placement, "_cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(placement, "_cpu_has_int8", lambda: True)
    monkeypatch.setattr(narrowing, "SMALLEST", 1)


@pytest.fixture
def models(tmp_path: Path) -> Pair:
    base = pico.llama(tmp_path / "base")
    return base, pico.tuned(base, tmp_path / "tuned", size=0.3)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return pico.texts(tmp_path / "texts.txt", 64)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The types that trainings were begun in; none of them takes a step."""
    seen: list[str] = []

    def stop(student: Any, data: Any, schedule: Any, *rest: Any, **named: Any) -> Any:
        seen.append(schedule.products)
        raise KeyboardInterrupt

    monkeypatch.setitem(compress.__globals__, "distill", stop)
    return seen


def begin(models: Pair, texts: Path, out: Path, **wished: Any) -> None:
    options = Options(steps=8, batch=8, budget=4000, held_out=16, device="cpu", **wished)
    with pytest.raises(KeyboardInterrupt):
        compress(*models, out, inputs=texts, options=options)


def with_outliers(models: Pair) -> None:
    """Make one activation of every norm large, and small what multiplies it: the same models."""
    factor = 2.0**12
    for folder in models:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[0] *= factor
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                tensor[:, 0] /= factor
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                tensor[:, 0] /= factor
        save_file(tensors, file, {"format": "pt"})


def test_a_base_without_large_activations_trains_in_8_bits(
    models: Pair, texts: Path, tmp_path: Path, chosen: list[str]
) -> None:
    begin(models, texts, tmp_path / "a.kd")
    assert chosen == ["int8"]


def test_a_base_whose_large_activations_leave_the_others_no_codes_does_not(
    models: Pair, texts: Path, tmp_path: Path, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_outliers(models)
    begin(models, texts, tmp_path / "a.kd")
    monkeypatch.setattr(placement, "_cpu_has_bfloat16", lambda: False)
    begin(models, texts, tmp_path / "b.kd")
    begin(models, texts, tmp_path / "c.kd", dtype="mixed-int8")  # who asks for it has it
    assert chosen == ["bfloat16", "float32", "int8"]


@pytest.mark.parametrize("batch", [4, 8, 64])
def test_a_type_is_tried_on_no_more_rows_than_a_step_has(
    batch: int,
    models: Pair,
    texts: Path,
    tmp_path: Path,
    chosen: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is not a number is no small number."""
    tried: list[int] = []

    def moved(student: Any, data: Any, products: str, rows: Any) -> float:
        tried.append(len(rows))
        return float("nan")

    monkeypatch.setattr(suiting, "moved_by", moved)
    options = Options(steps=8, batch=batch, budget=4000, held_out=48, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        compress(*models, tmp_path / "a.kd", inputs=texts, options=options)
    assert tried == [min(32, batch)]
    assert chosen == ["bfloat16"]


def test_what_is_for_grids_is_rounded_once(
    models: Pair, texts: Path, tmp_path: Path, chosen: list[str]
) -> None:
    begin(models, texts, tmp_path / "a.kd", precisions=("fp8",))
    begin(models, texts, tmp_path / "b.kd", precisions=("fp8",), dtype="mixed-int8")
    assert chosen == ["bfloat16", "int8"]


def test_codes_that_take_more_than_half_of_the_free_memory_are_not_made(
    models: Pair, texts: Path, tmp_path: Path, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(models[0] / "model.safetensors")
    assert "lm_head.weight" not in tensors  # the embedding is the head
    held = sum(2 * t.numel() for t in tensors.values() if t.dim() == 2)
    for free in (2 * held, 2 * held - 1):
        monkeypatch.setattr(suiting, "available", lambda device, free=free: free)
        begin(models, texts, tmp_path / f"{free}.kd")
    assert chosen == ["int8", "bfloat16"]
    monkeypatch.setattr(suiting, "available", lambda device: held - 1)
    options = Options(steps=8, batch=8, budget=4000, device="cpu", dtype="mixed-int8")
    with pytest.raises(InputError, match=r"weights as 8-bit codes take .* are free") as caught:
        compress(*models, tmp_path / "x.kd", inputs=texts, options=options)
    assert caught.value.fix == "give --dtype mixed, which holds no copies, or fp32"


def test_an_estimate_takes_its_steps_in_the_same_type(
    models: Pair, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watched(student: Any, data: Any, schedule: Any, progress: Any) -> Any:
        seen.append(schedule.products)
        return Run(student, data, schedule, progress)

    monkeypatch.setattr(estimate, "Run", watched)
    options = Options(steps=8, batch=8, budget=4000, held_out=16, device="cpu")
    before = plan(*models, inputs=texts, options=options)
    with_outliers(models)
    after = plan(*models, inputs=texts, options=options)
    assert seen == ["int8", "bfloat16"]
    assert [made.estimate.dtype for made in (before, after)] == ["mixed-int8", "mixed"]


@pytest.mark.parametrize("dtype", ["auto", "mixed-int8", "mixed", "fp32", "bf16"])
def test_a_report_says_what_it_was_trained_in(
    dtype: str, models: Pair, texts: Path, tmp_path: Path
) -> None:
    """So that a file can be made again on a processor where `auto` is another type."""
    options = Options(steps=8, batch=8, budget=4000, held_out=16, device="cpu", dtype=dtype)
    report = compress(*models, tmp_path / "a.kd", inputs=texts, options=options)
    assert report.dtype == ("mixed-int8" if dtype == "auto" else dtype)
    assert report.to_json()["dtype"] == report.dtype
    again = Options(steps=8, batch=8, budget=4000, held_out=16, device="cpu", dtype=report.dtype)
    compress(*models, tmp_path / "b.kd", inputs=texts, options=again)
    assert (tmp_path / "b.kd").read_bytes() == (tmp_path / "a.kd").read_bytes()
