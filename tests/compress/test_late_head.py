"""Logits that are computed inside the loss: the same loss, gradient and measures, less memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor, nn

from kilodelta.compress import Options, compress
from kilodelta.compress.distill import student as students
from kilodelta.compress.distill.learn import late_head
from kilodelta.compress.distill.learn.comparisons import TopClasses
from kilodelta.compress.distill.learn.late_head import LateTopClasses, find_head, late
from kilodelta.compress.distill.learn.outputs import Output
from kilodelta.compress.distill.learn.rows import Rows
from kilodelta.compress.distill.learn.survey import Survey
from kilodelta.compress.distill.teacher import ask as asking
from kilodelta.compress.distill.teacher.top_k import shorten
from kilodelta.models import open_model
from kilodelta.models.loaded import LoadedModel
from tests.support import pico, seq2seq


@pytest.mark.parametrize("cells", [1, 90, 1 << 20])
def test_loss_gradient_and_measures_are_those_of_whole_logits(
    cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_head, "CELLS", cells)
    torch.manual_seed(0)
    head = nn.Linear(6, 30)
    hidden = torch.randn(3, 4, 6, requires_grad=True)
    teacher = shorten(torch.randn(3, 4, 30), 5)
    weights = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    whole, chunked, draws = TopClasses(), LateTopClasses(head), torch.Generator()
    wanted = whole.loss(head(hidden), teacher, weights, draws)
    (slope,) = torch.autograd.grad(2 * wanted, hidden)
    found = chunked.loss(hidden, teacher, weights, draws)
    (near,) = torch.autograd.grad(2 * found, hidden)
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert torch.allclose(near, slope, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        assert torch.allclose(
            chunked.sums(hidden, teacher, weights), whole.sums(head(hidden), teacher, weights)
        )


def test_positions_that_do_not_count_get_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    one = LateTopClasses(nn.Linear(2, 9))
    teacher, weights = shorten(torch.randn(2, 3, 9), 2), torch.tensor([[0.0, 1, 0], [0, 0, 1]])
    parts = list(one.chunks(torch.arange(12.0).view(2, 3, 2), teacher, weights))
    assert torch.cat([part[0] for part in parts]).tolist() == [[2, 3], [10, 11]]
    nothing = one.loss(torch.randn(2, 3, 2), teacher, torch.zeros(2, 3), torch.Generator())
    assert float(nothing) == 0


def seen() -> Survey:
    output = Output(
        name="logits", kind="classes", weight=1, axis=2, size=pico.VOCABULARY, token_axes=(1,),
        kept=4,
    )  # fmt: skip
    return Survey(matched=(output,), ignored={}, one_row=False, padded=True)


ROWS = Rows(({"input_ids": torch.tensor([4, 5, 6])},), {})


def test_a_head_is_only_taken_where_logits_are_what_it_makes(tmp_path: Path) -> None:
    loaded = open_model(pico.llama(tmp_path / "a", tied=False))
    head: Any = loaded.module.lm_head
    assert find_head(loaded, ROWS, seen(), ["model.norm.weight"]) is head
    assert find_head(loaded, ROWS, seen(), ["lm_head.weight"]) is None
    assert "forward" not in head.__dict__
    whole = Survey(matched=(), ignored={}, one_row=False, padded=True)
    assert find_head(loaded, ROWS, whole, []) is None
    forward = loaded.module.forward

    def capped(**given: Any) -> Any:
        result = forward(**given)
        result.logits = torch.tanh(result.logits)
        return result

    loaded.module.forward = capped
    assert find_head(loaded, ROWS, seen(), []) is None
    tied = open_model(pico.llama(tmp_path / "b"))
    assert find_head(tied, ROWS, seen(), ["model.embed_tokens.weight"]) is None
    bare = LoadedModel(source="x", module=nn.Linear(2, 2), kind="any", names={})
    assert find_head(bare, ROWS, seen(), []) is None


def test_a_head_is_itself_again_whatever_happens() -> None:
    head = nn.Linear(2, 3)
    with late(head):
        assert head(torch.ones(1, 2)).shape == (1, 2)
    with pytest.raises(ZeroDivisionError), late(head):
        raise ZeroDivisionError
    assert head(torch.ones(1, 2)).shape == (1, 3)


def llama(place: Path) -> tuple[Path, Path]:
    """A decoder, and texts of several lengths."""
    some = pico.WORDS.split()
    lines = [" ".join(some[(i * j) % len(some)] for j in range(1, 4 + i % 5)) for i in range(48)]
    (place / "texts.txt").write_text("\n".join(lines) + "\n")
    return pico.llama(place / "base"), place / "texts.txt"


def whisper(place: Path) -> tuple[Path, Path]:
    """A model whose encoder puts out states beside the decoder's logits, and its inputs."""
    base = seq2seq.whisper(place / "base")
    config = json.loads((base / "config.json").read_text())
    draws, frames = np.random.default_rng(0), 2 * config["max_source_positions"]
    np.savez(
        place / "calls.npz",
        input_features=draws.normal(size=(48, config["num_mel_bins"], frames)).astype(np.float32),
        decoder_input_ids=draws.integers(4, config["vocab_size"], (48, 6)),
    )
    return base, place / "calls.npz"


@pytest.mark.parametrize("make", [llama, whisper])
def test_a_model_learns_the_same_with_late_logits(
    make: Callable[[Path], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, inputs = make(tmp_path)
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.2)
    for name, value in (("ROOM", 100), ("TOP_K", 8)):  # as a large vocabulary would be
        monkeypatch.setattr(asking, name, value)
    used: list[Any] = []

    def taken(*given: Any) -> Any:
        used.append(find_head(*given))
        return used[-1]

    monkeypatch.setattr(students, "find_head", taken)
    options = Options(steps=12, batch=8, budget=4000)
    short = compress(base, tuned, tmp_path / "a.kd", inputs=inputs, options=options)
    assert isinstance(used[0], nn.Linear)
    monkeypatch.setattr(students, "find_head", lambda *given: None)
    whole = compress(base, tuned, tmp_path / "b.kd", inputs=inputs, options=options)
    assert short.after is not None
    assert whole.after is not None
    assert short.before == whole.before
    assert short.after.divergence == pytest.approx(whole.after.divergence, rel=1e-3)


def test_what_a_step_keeps_is_smaller(tmp_path: Path) -> None:
    """For 4,096 words the hidden states of 16 numbers are kept, and no logits."""
    head = nn.Linear(16, 4096)
    hidden = torch.randn(8, 32, 16, requires_grad=True)
    teacher, weights = shorten(torch.randn(8, 32, 4096), 8), torch.ones(8, 32)
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        LateTopClasses(head).loss(hidden, teacher, weights, torch.Generator())
        late_bytes = sum(kept)
        kept.clear()
        TopClasses().loss(head(hidden), teacher, weights, torch.Generator())
    assert late_bytes == hidden.nbytes
    assert sum(kept) > 100 * late_bytes
