"""What counts as an effect, what torch's error excuses, and outputs that are no plain floats."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kilodelta.errors import ProofError
from kilodelta.verify.parity.cases import Case, cases
from kilodelta.verify.parity.judge import judge
from kilodelta.verify.parity.reference import Reference
from kilodelta.verify.parity.result import Result
from kilodelta.verify.runners.runner import Arrays, Batch
from kilodelta.verify.runners.torch_runner import TorchRunner

Outputs = dict[str, Tensor]


class Model(nn.Module):
    """A hidden layer and a head, and outputs computed from them by a function."""

    def __init__(self, outputs: Callable[[Model, Tensor], Outputs], width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(4, width), nn.Linear(width, 6)
        self.outputs = outputs

    def forward(self, x: Tensor) -> Outputs:
        return self.outputs(self, x)


class Runs:
    """A runner that computes by a function."""

    name = "runs"

    def __init__(self, answer: Callable[[Batch], Arrays]) -> None:
        self.run = answer

    def available(self) -> None:
        return None


def inputs(rows: int = 8) -> tuple[Case, ...]:
    x = np.random.default_rng(0).standard_normal((rows, 4)).astype(np.float32)
    return (Case(name="usual", batch={"x": x}),)


def tuned(base: Model, size: float = 0.3, layer: str = "head") -> Model:
    merged = copy.deepcopy(base)
    with torch.no_grad():
        getattr(merged, layer).weight.mul_(1 + size)
    return merged


def reference(
    merged: nn.Module, base: nn.Module, *names: str, cases: tuple[Case, ...] | None = None
) -> Reference:
    return Reference(merged, base, outputs=names, cases=cases or inputs())


def torch_in(module: nn.Module, precision: str, *names: str) -> TorchRunner:
    return TorchRunner(module, names, precision=precision, device="cpu")


def judged(runner: Any, against: Reference, precision: str = "float32") -> Result:
    return judge(runner, against, artefact="file", precision=precision)


def changed(module: nn.Module, precision: str, edit: Callable[[Arrays], None], *names: str) -> Runs:
    """A runner that computes right and then edits its outputs."""

    def answer(batch: Batch) -> Arrays:
        out = torch_in(module, precision, *names).run(batch)
        edit(out)
        return out

    return Runs(answer)


# overflow that no NaN shows


def absorbing(model: Model, x: Tensor) -> Outputs:
    """Squares overflow float16 and divide everything by infinity: zero, not NaN."""
    wide = model.hidden(x) * 2000
    return {"y": model.head(wide / wide.square().mean(-1, keepdim=True).sqrt())}


@pytest.mark.parametrize("factor", [1.5, 1.2, 2.0])
def test_torch_that_is_lost_excuses_nothing(factor: float) -> None:
    base = Model(absorbing)
    merged = tuned(base)
    against = reference(merged, base, "y")
    assert against.plain("float16")["y"][0].relative_l2 > 0.5
    right = judged(Runs(torch_in(merged, "float32", "y").run), against, "float16")
    assert right.status == "passed", right.reasons()

    def scale(out: Arrays) -> None:
        out["y"] *= factor

    result = judged(changed(merged, "float32", scale, "y"), against, "float16")
    assert result.status == "failed"
    [excess, why] = result.reasons()
    assert "(at most 0.1)" in excess
    assert why.startswith("float16 does not carry the model: plain torch in it is off by ")
    assert "bf16" in result.fix


# averages over many equal values


def pooled(model: Model, x: Tensor) -> Outputs:
    return {"y": model.head(model.hidden(x).mean(1))}


def test_a_mean_that_is_summed_in_order_is_no_fault() -> None:
    """The sum of a text repeated is off by a hundred roundings, in any runtime that adds in order,
    and by one in torch, which adds in pairs."""
    base = Model(pooled)
    merged = tuned(base)
    text = np.random.default_rng(3).standard_normal((4, 5, 4)).astype(np.float32)
    cases = (Case(name="largest", batch={"x": np.tile(text, (1, 400, 1))}),)
    against = reference(merged, base, "y", cases=cases)
    in_order = TorchRunner(merged, ["y"], precision="float32", device="cpu", in_order=True)
    plain = against.plain("float32")["y"][0]
    [found] = against.errors([in_order.run(cases[0].batch)])["y"]
    assert found.relative_l2 > 4 * plain.relative_l2  # or the test shows nothing
    assert judged(Runs(in_order.run), against).status == "passed"

    def nudge(out: Arrays) -> None:
        out["y"] += 2e-4 * np.abs(out["y"]).max()

    assert judged(changed(merged, "float32", nudge, "y"), against).status == "failed"


# NaN and infinity


def with_nan(model: Model, x: Tensor) -> Outputs:
    """An output that the fine-tune leaves alone, NaN in two rows and minus infinity in others."""
    hidden = model.hidden(x)
    scores = hidden.masked_fill(x[:, :1] > 0, -torch.inf)
    return {"y": model.head(hidden), "attention": torch.softmax(scores, -1), "masked": scores}


def test_nan_and_infinity_on_both_sides_are_equal_and_no_effect() -> None:
    base = Model(with_nan)
    merged = tuned(base)
    names = ("y", "attention", "masked")
    against = reference(merged, base, *names)
    assert np.isnan(against.merged[0]["attention"]).any()
    result = judged(Runs(torch_in(merged, "float32", *names).run), against)
    assert result.status == "passed", result.reasons()
    assert list(result.update) == ["y"]

    def fill(out: Arrays) -> None:
        out["attention"] = np.nan_to_num(out["attention"])

    assert judged(changed(merged, "float32", fill, *names), against).status == "failed"
    only = judged(Runs(torch_in(base, "float32", *names).run), against)
    assert "these are the base's outputs" in only.reasons()[-1]


def test_a_base_that_gives_nan_is_no_equal_of_a_model_that_does_not() -> None:
    class Nan(Model):
        def forward(self, x: Tensor) -> Outputs:
            return {"y": self.head(self.hidden(x)) * torch.nan}

    merged = Model(lambda model, x: {"y": model.head(model.hidden(x))})
    against = reference(merged, Nan(merged.outputs), "y")
    result = judged(Runs(torch_in(merged, "float32", "y").run), against)
    assert "nothing shows whether the update is present" in result.reasons()[0]


def lowest(model: Model, x: Tensor) -> Outputs:
    y = model.head(model.hidden(x))
    return {"y": y.masked_fill(x[:, :1] > 0, torch.finfo(y.dtype).min)}


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_scores_masked_with_the_lowest_number_of_their_type_are_equal(precision: str) -> None:
    base = Model(lowest)
    merged = tuned(base)
    result = judged(Runs(torch_in(merged, precision, "y").run), reference(merged, base, "y"),
                    precision)  # fmt: skip
    assert result.status == "passed", result.reasons()
    assert result.update["y"] == pytest.approx(1, abs=0.1)


# effects below rounding


def invariant(model: Model, x: Tensor) -> Outputs:
    """A score of the head, and shares that a common factor of the hidden layer does not change."""
    hidden = model.hidden.weight @ x.T
    return {"y": model.head(hidden.T), "share": (hidden / hidden.norm(dim=0)).T}


def test_rounding_noise_is_no_effect() -> None:
    """Float64 gives shares that differ in the last bit; no artefact can show that."""
    base = Model(invariant)
    with torch.no_grad():  # weights of few bits, which half as much again stays exact
        base.hidden.weight.mul_(256).round_().div_(256)
    merged = tuned(base, 0.5, layer="hidden")
    against = reference(merged, base, "y", "share")
    assert (against.merged[0]["share"] != against.base[0]["share"]).any()
    result = judged(Runs(torch_in(merged, "float32", "y", "share").run), against)
    assert result.status == "passed", result.reasons()
    assert list(result.update) == ["y"]
    with pytest.raises(ProofError, match="give the same outputs on these inputs"):
        reference(merged, base, "share")


def masked_twice(model: Model, x: Tensor) -> Outputs:
    """ProphetNet's masks: in float64 the least number, added twice, leaves a softmax of NaN."""
    least = torch.finfo(x.dtype).min if x.dtype == torch.float64 else -1e30
    scores = model.hidden(x) + least + least
    return {"y": model.head(torch.softmax(scores, -1))}


def test_a_reference_of_nan_alone_is_said_to_be_none() -> None:
    base = Model(masked_twice)
    with pytest.raises(ProofError, match="nothing but NaN in float64"):
        reference(tuned(base, 0.5), base, "y")


def plain(model: Model, x: Tensor) -> Outputs:
    return {"y": model.head(model.hidden(x))}


@pytest.mark.parametrize("which", ["merged", "base"])
def test_an_effect_that_a_precision_rounds_away_proves_nothing(which: str) -> None:
    base = Model(plain)
    merged = tuned(base, 1e-5)
    against = reference(merged, base, "y")
    model = {"merged": merged, "base": base}[which]
    half = judged(Runs(torch_in(model, "float16", "y").run), against, "float16")
    assert (half.status, half.update, half.unseen) == ("failed", {}, True)
    assert half.reasons()[0].startswith("in float16, rounding is coarser than what the fine-tune")
    assert half.fix == "give more inputs of the task, or export a finer precision"
    single = judged(Runs(torch_in(model, "float32", "y").run), against)
    assert single.status == {"merged": "passed", "base": "failed"}[which]


# labels and masks


def with_labels(model: Model, x: Tensor) -> Outputs:
    y = model.head(model.hidden(x))
    return {"y": y, "label": y.argmax(-1), "sure": y.amax(-1) > 0.3}


NAMES = ("y", "label", "sure")


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_labels_are_right_though_scores_nearly_tie(precision: str) -> None:
    base = Model(with_labels)
    merged = tuned(base)
    against = reference(merged, base, *NAMES, cases=inputs(500))
    result = judged(Runs(torch_in(merged, precision, *NAMES).run), against, precision)
    assert result.status == "passed", result.reasons()
    assert list(result.update) == ["y"]  # scores tell, so labels need not


@pytest.mark.parametrize("name", ["label", "sure"])
def test_a_wrong_label_is_wrong_however_near_its_number_is(name: str) -> None:
    base = Model(with_labels)
    merged = tuned(base)
    against = reference(merged, base, *NAMES)

    def flip(out: Arrays) -> None:
        clear = int(np.flatnonzero(against._clear(name)[0])[0])
        out[name][clear] = out[name][clear] ^ 1

    result = judged(changed(merged, "float32", flip, *NAMES), against)
    assert result.status == "failed"
    assert result.reasons()[0].startswith(f"{name} at the usual shape")


def only_labels(model: Model, x: Tensor) -> Outputs:
    return {"label": model.head(model.hidden(x)).argmax(-1)}


def test_labels_alone_show_the_update() -> None:
    base = Model(only_labels)
    merged = copy.deepcopy(base)
    with torch.no_grad():
        merged.head.weight.neg_()
    against = reference(merged, base, "label", cases=inputs(50))
    right = judged(Runs(torch_in(merged, "float32", "label").run), against)
    wrong = judged(Runs(torch_in(base, "float32", "label").run), against)
    assert (right.status, right.update) == ("passed", {"label": 1.0})
    assert wrong.update == {"label": 0.0}


# rows at a time


def test_rows_at_a_time_give_the_same_reference_and_tell_how_far_they_are() -> None:
    base = Model(plain)
    merged = tuned(base)
    events: list[Any] = []
    build = functools.partial(Reference, merged, base, outputs=["y"], cases=inputs())
    few, whole = build(rows=3, progress=events.append), build()
    np.testing.assert_allclose(few.merged[0]["y"], whole.merged[0]["y"], rtol=1e-13)
    told = [(event.done, event.total) for event in events if event.detail["model"] == "base"]
    assert told == [(3, 8), (6, 8), (8, 8)]


class Attends(nn.Module):
    """A causal attention, and the state of the first token that is 1 (the first one, if none)."""

    def __init__(self, *, fused: bool, at_last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(9, 8), nn.Linear(8, 8)
        self.fused, self.at_last = fused, at_last

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        x, length = self.words(input_ids), input_ids.shape[1]
        seen = torch.ones(length, length).tril().bool() & (attention_mask[:, None] > 0)
        if self.fused:  # zeros where a query sees nothing
            mixed = functional.scaled_dot_product_attention(x, x, x, attn_mask=seen)
        else:  # an average there, as runtimes compute
            least = torch.finfo(x.dtype).min
            weights = (x @ x.mT / 8**0.5).masked_fill(~seen, least).softmax(-1)
            mixed = weights @ x
        states = x + self.head(mixed)
        place = length - 1 if self.at_last else (input_ids == 1).int().argmax(-1)
        return {"states": states, "pooled": states[torch.arange(len(x)), place]}


@pytest.mark.parametrize("at_last", [False, True])
def test_what_a_model_takes_from_left_padding_has_no_right_value(at_last: bool) -> None:
    """CLIP's text embedding: the state at its end-of-text token, which padding may hold."""
    ids = np.array([[5, 6, 7, 8, 2, 3], [4, 5, 2, 6, 7, 3]])
    tokens = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = cases(tokens, {name: ((2, 6), (2, 5), (2, 6)) for name in tokens}, left=True)
    fused, eager = (Attends(fused=fused, at_last=at_last).eval() for fused in (True, False))
    against = reference(tuned_head(fused), fused, "states", "pooled", cases=found)
    assert against.undefined == (frozenset() if at_last else {"pooled"})
    result = judged(torch_in(tuned_head(eager), "float32", "states", "pooled"), against)
    assert result.status == "passed", result.reasons()
    compared = {(check.output, check.case) for check in result.checks}
    everywhere = {(name, case.name) for name in ("states", "pooled") for case in found}
    assert everywhere - compared == (set() if at_last else {("pooled", "left-padded")})
    # Where rows are padded on the right, or not at all, it is compared.
    off = changed(tuned_head(fused), "float32", pooled_off, "states", "pooled")
    assert judged(off, against).status == "failed"


def tuned_head(base: nn.Module) -> nn.Module:
    return tuned(base, layer="head")  # type: ignore[arg-type]


def pooled_off(results: Arrays) -> None:
    results["pooled"] = results["pooled"] * np.float32(1.01)
