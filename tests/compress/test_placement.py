"""Device, type and threads of a compression, and steps that memory does not hold at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import kilodelta
from kilodelta.compress import Options, Report, compress
from kilodelta.compress.distill.learn import steps
from kilodelta.compress.distill.learn.comparisons import (
    Comparison,
    Head,
    Relational,
    comparison_for,
)
from kilodelta.compress.distill.learn.gradient.pieces import backward, is_out_of_memory
from kilodelta.compress.distill.learn.objective import Objective
from kilodelta.compress.distill.learn.outputs import Output, run
from kilodelta.compress.distill.options import check
from kilodelta.compress.distill.placement import choose_placement, own_settings, stored_type
from kilodelta.compress.distill.teacher.top_k import shorten
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.models import open_model, outputs, tokenize
from kilodelta.models.weights import values
from tests.support import pico


def narrowed(folder: Path, dtype: torch.dtype) -> Path:
    """The same model, its floats in another type."""
    file = folder / "model.safetensors"
    tensors = {name: t.to(dtype) for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    base = narrowed(pico.llama(tmp_path / "base"), torch.bfloat16)
    return base, pico.tuned(base, tmp_path / "tuned", size=0.3)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return pico.texts(tmp_path / "texts.txt", 64)


def make(models: tuple[Path, Path], texts: Path, out: Path, **chosen: Any) -> Report:
    usual = {"steps": 24, "batch": 8, "budget": 4000, "held_out": 16, "dtype": "fp32"}
    options = Options(**{**usual, **chosen})  # auto would be what this processor is fast in
    return compress(*models, out, inputs=texts, options=options)


def test_auto_is_the_base_s_type_where_it_is_fast(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CUDA branches, by a double of what torch says: no GPU has run them."""
    bf16 = Checkpoint.open(models[0])
    fp32 = Checkpoint.open(pico.llama(tmp_path / "wide"))
    assert (stored_type(bf16), stored_type(fp32)) == (torch.bfloat16, torch.float32)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # no ARM
    for fast, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
        assert choose_placement("cpu", "auto", bf16).dtype == wanted
        assert choose_placement("cpu", "auto", fp32).name == ("mixed" if fast else "fp32")
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
        products = choose_placement("cpu", "auto", fp32).products
        assert products == (("int8", "bfloat16", "float32") if fast else ("int8", "float32"))
        assert choose_placement("cpu", "auto", bf16).products == ("float32",)
    with pytest.raises(InputError, match="training in float16 needs a GPU") as caught:
        choose_placement("cpu", "fp16", fp32)
    assert caught.value.fix == "give --dtype bf16, fp32 or auto"
    with pytest.raises(InputError, match="torch sees no CUDA GPU"):
        choose_placement("cuda:0", "auto", fp32)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    found = choose_placement("auto", "auto", bf16)
    assert (found.device.type, found.dtype) == ("cuda", torch.bfloat16)
    assert choose_placement("cuda:1", "auto", fp32).name == "fp32"
    with pytest.raises(InputError, match="there is no cuda:2: torch sees 2 GPUs"):
        choose_placement("cuda:2", "auto", fp32)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert choose_placement("cuda", "auto", bf16).dtype == torch.float32
    with pytest.raises(InputError, match="a GPU does not compute in bfloat16"):
        choose_placement("cuda", "bf16", bf16)


@pytest.mark.parametrize("name", ["graphics", "meta", "cuda:x", "tpu:0", "cpu:1", ""])
def test_what_is_no_device_is_refused(name: str, models: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match="is no device"):
        choose_placement(name, "auto", Checkpoint.open(models[0]))
    with pytest.raises(InputError, match="is no type"):
        check(Options(dtype="float32"), learns=True)


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    with own_settings(3):
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
    with own_settings(None):
        assert torch.get_num_threads() == before


@contextmanager
def default(dtype: torch.dtype, device: str) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "told",
    [
        torch.no_grad,
        torch.inference_mode,
        partial(torch.autocast, "cpu", dtype=torch.bfloat16),
        partial(default, torch.bfloat16, "meta"),
    ],
)
def test_what_a_caller_has_told_torch_changes_nothing(
    told: Callable[[], AbstractContextManager[Any]],
    models: tuple[Path, Path],
    texts: Path,
    tmp_path: Path,
) -> None:
    alone = make(models, texts, tmp_path / "a.kd")
    with told():
        before = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
        report = make(models, texts, tmp_path / "b.kd")
        after = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    assert after == before
    assert (tmp_path / "b.kd").read_bytes() == (tmp_path / "a.kd").read_bytes()
    assert report.after == alone.after


def test_what_is_measured_in_bfloat16_is_the_merged_model(
    models: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    """Base and compute type are bfloat16: the reported figures are those of the merged files, as
    transformers opens them, on the held-out texts."""
    report = make(models, texts, tmp_path / "a.kd", dtype="bf16")
    kilodelta.merge(models[0], tmp_path / "a.kd", tmp_path / "merged")
    generator = torch.Generator().manual_seed(0)
    lines = texts.read_text().splitlines()
    chosen = torch.randperm(len(lines), generator=generator).tolist()[:16]
    same = count = 0
    student = open_model(tmp_path / "merged", dtype=torch.bfloat16)
    teacher = open_model(models[1], dtype=torch.bfloat16)
    assert next(student.module.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        for index in chosen:
            batch = tokenize(student, [lines[index]])
            ours, theirs = (outputs(m, batch)["logits"].argmax(-1) for m in (student, teacher))
            same, count = same + int((ours == theirs).sum()), count + ours.numel()
    assert report.after is not None
    assert report.after.agreement == pytest.approx(same / count, abs=1.5 / count)


def test_bfloat16_ends_where_float32_does(
    models: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    wide = make(models, texts, tmp_path / "a.kd", dtype="fp32")
    narrow = make(models, texts, tmp_path / "b.kd", dtype="bf16")
    assert wide.after is not None
    assert narrow.after is not None
    assert narrow.after.divergence == pytest.approx(wide.after.divergence, rel=0.1)
    assert narrow.method == wide.method


def test_extras_train_in_float32_beside_a_bfloat16_base(
    models: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    """At a rate whose steps a bfloat16 weight near 1 would round away, one by one."""
    file, name = models[1] / "model.safetensors", "model.norm.weight"
    tensors = load_file(file)
    tensors[name] = tensors[name] + 0.5
    save_file(tensors, file, {"format": "pt"})
    make(models, texts, tmp_path / "a.kd", dtype="bf16", rate=1e-3, steps=40, extras=name)
    extra = kilodelta.load(tmp_path / "a.kd", base=models[0]).extras[name]
    assert extra.dtype == "BF16"
    assert int((values(extra) != tensors[name]).sum()) > len(tensors[name]) // 2


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_a_step_that_memory_does_not_hold_is_halved(
    models: tuple[Path, Path],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    problem: Exception,
) -> None:
    """The double raises what a GPU or numpy raises; the loss and its gradient are the same."""
    whole = make(models, texts, tmp_path / "a.kd", steps=4)

    def small(loaded: Any, batch: dict[str, Tensor], **rest: Any) -> Any:
        if torch.is_grad_enabled() and len(batch["input_ids"]) > 3:
            raise problem
        return run(loaded, batch, **rest)

    monkeypatch.setattr(steps, "run", small)
    pieces = make(models, texts, tmp_path / "b.kd", steps=4)
    assert pieces.after is not None
    assert whole.after is not None
    assert pieces.after.divergence == pytest.approx(whole.after.divergence, rel=1e-3)
    assert any("2 inputs at a time" in warning for warning in pieces.warnings)
    assert not any("at a time" in warning for warning in whole.warnings)

    def tiny(loaded: Any, batch: dict[str, Tensor], **rest: Any) -> Any:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(steps, "run", tiny)
    with pytest.raises(InputError, match="memory ran out on a single input"):
        make(models, texts, tmp_path / "c.kd", steps=4)


def test_what_is_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 10 bytes"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert is_out_of_memory(MemoryError())


def an_output(kind: Any, axis: int | None, kept: int = 0) -> Output:
    return Output(name="y", kind=kind, weight=1.0, axis=axis, size=0, token_axes=(1,), kept=kept)


CASES: Mapping[str, tuple[Output, Callable[[Output], Comparison] | None]] = {
    "classes": (an_output("classes", 2), None),
    "shortened": (an_output("classes", 2, kept=3), None),
    "labels": (an_output("labels", 2), None),
    "states": (an_output("states", 2), None),
    "values": (an_output("values", None), None),
    "relational": (an_output("states", 2), lambda o: Relational(torch.randn(9, 5))),
    "head": (an_output("states", 2), lambda o: Head(torch.randn(4, 5), pull=0.7)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("piece", [1, 2, 3, 6])
def test_pieces_have_the_gradient_of_the_whole_batch(name: str, piece: int) -> None:
    """For every objective, none of which is a plain sum over rows."""
    torch.manual_seed(0)
    output, special = CASES[name]
    comparison = comparison_for(output) if special is None else special(output)
    objective = Objective(outputs=[output], comparisons=[comparison])
    weight = torch.randn(4, 5, requires_grad=True)
    x, teacher = torch.randn(6, 3, 4), torch.randn(6, 3, 5)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]])
    wanted = {"y": shorten(teacher, 3) if output.kept else teacher}

    def compute(rows: slice) -> dict[str, Tensor]:
        return {"y": torch.tanh(x[rows] @ weight)}

    def loss_of(found: Mapping[str, Tensor]) -> Tensor:
        return objective.loss(found, wanted, mask, torch.Generator().manual_seed(1))

    whole = backward(compute, loss_of, 6, 6)
    gradient, weight.grad = weight.grad, None
    parts = backward(compute, loss_of, 6, piece)
    assert gradient is not None
    assert weight.grad is not None
    assert torch.allclose(whole, parts, rtol=1e-5)
    assert torch.allclose(gradient, weight.grad, rtol=1e-4, atol=1e-6)
