"""Shapes that a model computes and memory holds: found by trying, said in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kilodelta import memory
from kilodelta.errors import InputError
from kilodelta.export.manifest.facts import Profile
from kilodelta.progress import Event
from kilodelta.verify.parity import plan
from kilodelta.verify.parity.cases import cases
from kilodelta.verify.parity.plan import BYTES
from kilodelta.verify.parity.traits import Trial, longest

WORDS = 50


class Decoder(nn.Module):
    """Logits over `WORDS` from the tokens up to each position; `positions` of them at most."""

    def __init__(self, positions: int = 512, *, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, 8), nn.Embedding(positions, 8)
        self.head, self.causal = nn.Linear(8, WORDS), causal
        self.longest = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        length = input_ids.shape[1]
        self.longest = max(self.longest, input_ids.numel())
        states = self.words(input_ids) + self.places(torch.arange(length))
        states = states * attention_mask[..., None]
        mixed = states.cumsum(1) if self.causal else states.sum(1, keepdim=True) + states
        return {"logits": self.head(mixed)}


def batch(rows: int = 2, length: int = 10) -> dict[str, Any]:
    ids = np.random.default_rng(0).integers(1, WORDS, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def profile(*points: tuple[int, int]) -> Profile:
    smallest, usual, largest = points
    return {name: (smallest, usual, largest) for name in ("input_ids", "attention_mask")}


USUAL = profile((1, 1), (8, 32), (32, 512))


def planned(module: nn.Module, shapes: Profile = USUAL, limit: int = 1 << 40) -> plan.ParityPlan:
    return plan.plan(module.eval(), ["logits"], batch(), shapes, limit=limit)


def test_shapes_that_fit_are_left_alone() -> None:
    found = planned(Decoder())
    assert found.profile == USUAL
    assert found.notes == ()
    assert found.nbytes == 32 * 512 * WORDS * BYTES


@pytest.mark.parametrize("positions", [62, 33, 31, 2, 1])
def test_a_profile_is_cut_at_the_models_positions(positions: int) -> None:
    """RoBERTa's begin after its padding index, and other configurations state none at all."""
    found = planned(Decoder(positions))
    assert found.profile == profile((1, 1), (8, min(32, positions)), (32, positions))
    [note] = found.notes
    assert note.startswith(f"compared up to 1x{positions}, not 1x512: the model cannot compute")
    assert "index out of range" in note


@pytest.mark.parametrize(
    ("tokens", "usual", "largest"),
    [(7 * 512, (8, 32), (7, 512)), (600, (8, 32), (1, 512)), (100, (3, 32), (1, 100)),
     (20, (1, 20), (1, 20))],
)  # fmt: skip
def test_what_does_not_fit_is_cut_rows_first(
    tokens: int, usual: tuple[int, int], largest: tuple[int, int]
) -> None:
    module = Decoder()
    found = planned(module, limit=tokens * WORDS * BYTES)
    assert found.profile == profile((1, 1), usual, largest)
    assert found.nbytes <= tokens * WORDS * BYTES
    assert module.longest <= 512  # nothing larger than one row was tried
    [note] = found.notes
    shape = "x".join(map(str, largest))
    assert note.startswith(f"compared at {shape}, not 32x512, whose outputs take 0.033 GB: ")


def test_a_row_that_cannot_fit_is_not_even_tried() -> None:
    module = Decoder()
    planned(module, limit=100 * WORDS * BYTES)
    assert module.longest <= 100


def test_what_does_not_fit_at_all_is_refused() -> None:
    with pytest.raises(InputError, match=r"comparing 4x512 takes 0.0041 GB, and 0.001 GB may be"):
        planned(Decoder(), profile((4, 512), (4, 512), (4, 512)), limit=10**6)


def test_a_model_that_cannot_compute_the_smallest_shape_says_so() -> None:
    with pytest.raises(InputError, match=r"cannot compute input_ids int64 \(1, 64\)"):
        planned(Decoder(positions=62), profile((1, 64), (8, 64), (32, 64)))


class Places(Decoder):
    """Takes rows with two places for pictures alone, as a vision-language model does."""

    PLACE = WORDS - 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        if int((input_ids == self.PLACE).sum()) != 2 * len(input_ids):
            raise ValueError("image features and image tokens do not match")
        return super().forward(input_ids, attention_mask)


def test_rows_that_cannot_be_cut_are_compared_whole() -> None:
    given = batch()
    given["input_ids"] = np.minimum(given["input_ids"], Places.PLACE - 1)
    given["input_ids"][:, 1:3] = Places.PLACE
    given["attention_mask"][1, 7:] = 0
    chosen = plan.plan(Places().eval(), ["logits"], given, USUAL, limit=1 << 40)
    assert chosen.whole
    assert [shape for shape in chosen.profile["input_ids"]] == [(1, 10), (8, 10), (32, 10)]
    assert chosen.notes[0].startswith("compared at the inputs' own lengths alone: ")
    assert "do not match" in chosen.notes[0]
    for case in cases(given, chosen.profile, whole=True):
        rows = np.arange(len(case.batch["input_ids"])) % 2
        assert all((case.batch[name] == array[rows]).all() for name, array in given.items())
    # The only length that fits: a row is padded nowhere else than in the inputs.
    assert plan.plan(Places().eval(), ["logits"], given, profile((2, 10), (2, 11), (2, 11))).whole
    # What no shape of the profile has is refused as before.
    with pytest.raises(InputError, match="do not match"):
        plan.plan(Places().eval(), ["logits"], given, profile((1, 1), (2, 4), (4, 9)))


def test_both_limits_are_told() -> None:
    found = planned(Decoder(62), limit=4 * 62 * WORDS * BYTES)
    assert found.profile["input_ids"] == ((1, 1), (7, 32), (4, 62))
    assert [note.split(":")[0] for note in found.notes] == [
        "compared up to 1x62, not 1x248",
        "compared at 4x62, not 32x62, whose outputs take 0.004 GB",
    ]


def test_the_estimate_comes_before_the_work() -> None:
    events: list[Event] = []
    plan.plan(Decoder().eval(), ["logits"], batch(), USUAL, progress=events.append)
    assert [(event.stage, event.done) for event in events] == [("estimate", 0), ("estimate", 1)]
    assert events[1].detail["memory"] == "0.033 GB"
    assert str(events[1].detail["time"]).startswith("about ")


def test_a_machine_with_much_memory_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1 << 40)
    monkeypatch.setattr(plan, "MOST", 100 * WORDS * BYTES)
    events: list[Event] = []
    module = Decoder().eval()
    found = plan.plan(module, ["logits"], batch(), USUAL, progress=events.append)
    assert found.profile["input_ids"] == ((1, 1), (3, 32), (1, 100))
    assert [note.split(",")[0] for note in found.notes] == ["compared at 1x100"]
    # The outputs, and the weights in float64: two embeddings and the head.
    needed = 100 * WORDS * BYTES + 8 * (WORDS * 8 + 512 * 8 + 9 * WORDS)
    assert events[1].detail["memory"] == f"{needed / 1e9:.2g} GB"
    monkeypatch.setattr(memory, "available", lambda: 2 * 50 * WORDS * BYTES)
    found = plan.plan(module, ["logits"], batch(), USUAL)
    assert found.profile["input_ids"][2] == (1, 50)


def test_rows_are_computed_a_few_at_a_time_where_they_are_independent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "PASS_ELEMENTS", 3 * 512 * WORDS)
    monkeypatch.setattr(plan, "PASS_SECONDS", 1e9)
    assert planned(Decoder()).rows == 3

    class Similar(Decoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            logits = super().forward(input_ids, attention_mask)["logits"]
            return {"logits": logits + logits.mean(0, keepdim=True)}

    assert planned(Similar()).rows is None


class Clip(nn.Module):
    """Similarities of every row with every row."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x @ x.T}


def test_rows_that_are_compared_with_each_other_depend() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert not Trial(Clip().eval(), ["logits"], {"x": x}).rows_are_independent({"x": (1, 4)})


def test_decoders_are_told_from_encoders() -> None:
    causal, encoder = (
        Trial(Decoder(causal=causal).eval(), ["logits"], batch()) for causal in (True, False)
    )
    assert causal.reads_left_to_right()
    assert not encoder.reads_left_to_right()


def test_what_has_no_tokens_is_no_decoder() -> None:
    assert not Trial(Clip().eval(), ["logits"], {"x": np.ones((3, 4))}).reads_left_to_right()
    short = {name: array[:, :1] for name, array in batch().items()}
    assert not Trial(Decoder().eval(), ["logits"], short).reads_left_to_right()


@pytest.mark.parametrize("limit", range(1, 12))
def test_the_longest_that_works(limit: int) -> None:
    tried: list[int] = []

    def works(number: int) -> bool:
        tried.append(number)
        return number <= limit

    assert longest(works, 1, 11) == limit
    assert len(tried) <= 4


# memory


def test_memory_is_the_least_of_machine_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   4000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_GROUPS", ((tmp_path / "max", tmp_path / "now"),))
    assert memory.available() == 4000 << 10
    (tmp_path / "max").write_text("3000000\n")
    (tmp_path / "now").write_text("1000000\n")
    assert memory.available() == 2_000_000
    (tmp_path / "max").write_text("max\n")
    assert memory.available() == 4000 << 10
    (tmp_path / "meminfo").unlink()
    assert memory.available() == memory.UNKNOWN
