"""Which outputs are matched, along which axes: what is reported is what the merged model does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kilodelta
from kilodelta.compress import Options, compress
from kilodelta.compress.distill.learn.comparisons import Values, comparison_for, kl
from kilodelta.compress.distill.learn.objective import Objective
from kilodelta.compress.distill.learn.outputs import Output, Wanted
from kilodelta.compress.distill.learn.rows import Rows, to_rows
from kilodelta.compress.distill.learn.survey import Survey, survey
from kilodelta.compress.distill.report import Report
from kilodelta.compress.distill.teacher.ask import ask
from kilodelta.errors import InputError
from kilodelta.format.methods import Lora, Method, RandLora
from kilodelta.models import open_model, outputs
from kilodelta.models.loaded import LoadedModel
from tests.support import many_outputs
from tests.support.many_outputs import OUTPUTS, Spec

PLACE = "tests.support.many_outputs:"
ROWS, HELD_OUT = 48, 24


def drawn(seed: int) -> Spec:
    """A random subset of inputs, mask, nesting and outputs."""
    rng = random.Random(seed)
    inputs = ("tokens", "image", "audio")[seed % 3]
    mask = inputs != "image" and rng.random() < 0.6
    names = [n for n in OUTPUTS[inputs] if mask or n != "pair_logits"]
    chosen = rng.sample(names, rng.randint(1, len(names)))
    return Spec(inputs=inputs, mask=mask, outputs=tuple(chosen), nested=rng.random() < 0.5)


def run(spec: Spec, folder: Path, method: Method, **options: Any) -> tuple[Report, float]:
    """Compress a random fine-tune; the report, and the agreement computed without it."""
    many_outputs.SPEC = spec
    many_outputs.BATCHES = many_outputs.draw_batches(spec, ROWS, seed=7)
    module = many_outputs.make()
    base = many_outputs.save(module, folder / "base.safetensors")
    with torch.no_grad():
        torch.manual_seed(3)
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    tuned = many_outputs.save(module, folder / "tuned.safetensors")
    classes = {} if spec.mask else {"*early_logits": 1}
    report = compress(
        base,
        tuned,
        folder / "task.kd",
        inputs=PLACE + "batches",
        options=Options(
            method=method,
            bits=8,
            steps=6,
            # The full rate, which six steps do not have by themselves: far from the base, no two
            # scores of equal tokens differ by rounding alone.
            rate=method.rate,
            batch=8,
            held_out=HELD_OUT,
            model=PLACE + "make",
            classes=classes if "early_logits" in spec.outputs else {},
            **options,
        ),
    )
    kilodelta.merge(base, folder / "task.kd", folder / "merged.safetensors")
    ours, theirs = (
        alone(open_model(PLACE + "make", weights=folder / f"{name}.safetensors"))
        for name in ("merged", "tuned")
    )
    each = [many_outputs.agreement(ours, theirs, one.name) for one in report.outputs]
    weights = [one.weight for one in report.outputs]
    return report, float(np.dot(each, weights))


@torch.no_grad()
def alone(model: LoadedModel) -> list[dict[str, Tensor]]:
    """The outputs of each held-out row, computed by itself and without padding."""
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0)).tolist()
    rows = to_rows(many_outputs.BATCHES, pad_token=0)
    return [outputs(model, rows.batch([index])) for index in order[:HELD_OUT]]


@pytest.mark.parametrize("seed", range(12))
def test_the_agreement_reported_is_that_of_the_merged_model(seed: int, tmp_path: Path) -> None:
    spec = drawn(seed)
    method: Method = Lora(rank=1) if seed % 2 else RandLora(rank=4)
    report, wanted = run(spec, tmp_path, method)
    assert {one.name.rpartition(".")[2] for one in report.outputs} == set(spec.outputs)
    assert not report.ignored
    assert report.after is not None
    assert report.after.agreement == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    made = kilodelta.inspect(tmp_path / "task.kd").made
    assert made["agreement"] == round(report.after.agreement, 4)
    assert made["agreement_counts"] == report.kind
    assert ("kl" in made) == (report.kind in ("top-1", "yes-no"))
    assert ("distance" in made) != ("kl" in made)


def test_chosen_outputs_count_by_their_weights(tmp_path: Path) -> None:
    spec = Spec(inputs="tokens", mask=True, outputs=("logits", "states", "score"), nested=True)
    weights = {"logits": 3.0, "inner.*.states": 1.0}
    report, wanted = run(spec, tmp_path, Lora(rank=1), outputs=weights)
    found = {one.name: (one.weight, one.kind, one.counts) for one in report.outputs}
    assert found == {
        "logits": (0.75, "classes", "top-1"),
        "inner.deep.states": (0.25, "states", "cosine"),
    }
    assert report.kind == "mixed"
    assert report.after is not None
    assert report.after.agreement == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_distilling_without_a_mask_follows_every_token(tmp_path: Path) -> None:
    """Once each remembered output was cut to its first token, and the loss broadcast."""
    spec = Spec(inputs="tokens", mask=False, outputs=("token_logits",))
    report, wanted = run(spec, tmp_path, Lora(rank=8), targets=("body.*", "classes.*", "first.*"))
    assert report.before is not None
    assert report.after is not None
    assert report.after.agreement == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert report.after.agreement > 0.95 > report.before.agreement


class Fixed(nn.Module):
    """Puts out what it was given, by input name."""

    def __init__(self, **result: Any) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {name: make(x) for name, make in self.result.items()}


def survey_of(wanted: Wanted | None = None, rows: int = 4, **result: Any) -> Survey:
    loaded = LoadedModel(source="fixed", module=Fixed(**result), kind="any", names={})
    parts = tuple({"x": torch.arange(6.0) + i} for i in range(rows))
    return survey(loaded, Rows(parts, {}), wanted or Wanted())


def test_what_is_no_output_per_row_is_left_out_by_name() -> None:
    found = survey_of(
        logits=lambda x: x[:, :3],
        loss=lambda x: x.sum(),
        ids=lambda x: x.long(),
        table=lambda x: torch.zeros(7, 2),
        logits_per_image=lambda x: x @ x.T,
    )
    assert [output.name for output in found.matched] == ["logits"]
    assert found.ignored["loss"] == "is one number for the whole batch"
    assert found.ignored["ids"] == "is int64, not floats"
    assert "its first axis is not the rows'" in found.ignored["table"]
    assert "compares the rows of a batch with each other" in found.ignored["logits_per_image"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(weights={"nothing": 1}), "the model has no output nothing"),
        (Wanted(classes={"nothing": 1}), "the model has no output nothing"),
        (Wanted(weights={"ids": 1}), "output ids is int64, not floats, so it cannot be distilled"),
        (Wanted(classes={"logits": 0}), r"of shape \(1, 3\) has no axis 0 of classes"),
        (Wanted(classes={"logits": 2}), r"of shape \(1, 3\) has no axis 2 of classes"),
    ],
)
def test_a_wish_that_does_not_fit(wanted: Wanted, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        survey_of(wanted, logits=lambda x: x[:, :3], ids=lambda x: x.long())


def test_nothing_to_distil() -> None:
    with pytest.raises(InputError, match="puts out nothing that can be distilled: ids is int64"):
        survey_of(ids=lambda x: x.long())


def test_kinds_that_a_shape_does_not_tell() -> None:
    found = survey_of(
        Wanted(classes={"plain": -1}),
        plain=lambda x: x[:, :3],
        start_logits=lambda x: x,
        mask_logits=lambda x: x[:, :4].reshape(-1, 1, 2, 2),
        regression_logits=lambda x: x[:, :1],
        number=lambda x: x[:, 0],
        seg_logits=lambda x: x.repeat(1, 2).reshape(-1, 3, 2, 2),
    )
    assert {o.name: (o.kind, o.axis) for o in found.matched} == {
        "plain": ("classes", 1),
        "start_logits": ("classes", 1),
        "mask_logits": ("labels", None),
        "regression_logits": ("values", None),
        "number": ("values", None),
        "seg_logits": ("classes", 1),
    }


def test_a_model_of_one_row_is_computed_row_by_row() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(1, 6)[:, :2]

    loaded = LoadedModel(source="one", module=One(), kind="any", names={})
    rows = Rows(tuple({"x": torch.arange(6.0) + i} for i in range(5)), {})
    seen = survey(loaded, rows, Wanted())
    assert seen.one_row
    teacher, _ = ask(loaded, rows, seen, lambda event: None)
    assert teacher([3, 1])["output"].tolist() == [[3, 4], [1, 2]]


def test_a_remembered_output_is_cut_only_along_the_tokens() -> None:
    many_outputs.SPEC = spec = Spec(inputs="tokens", mask=True, outputs=OUTPUTS["tokens"])
    rows = to_rows(many_outputs.draw_batches(spec, 9, seed=1), pad_token=0)
    loaded = LoadedModel(source="many", module=many_outputs.make(), kind="any", names={})
    seen = survey(loaded, rows, Wanted())
    tokens = {output.name: output.token_axes for output in seen.matched}
    assert tokens == {
        "logits": (), "score": (), "box": (), "states": (1,), "token_logits": (1,),
        "early_logits": (2,), "start_logits": (1,), "pair_logits": (1, 2),
    }  # fmt: skip
    teacher, _ = ask(loaded, rows, seen, lambda event: None)
    chosen = sorted(range(9), key=rows.length)[-3:]
    together = teacher(chosen)
    with torch.no_grad():
        for place, index in enumerate(chosen):
            for name, values in outputs(loaded, rows.batch([index])).items():
                part = together[name][place]
                inside = part[tuple(slice(0, n) for n in values.shape[1:])]
                assert torch.allclose(inside, values[0], atol=1e-5), name


def test_padding_does_not_count() -> None:
    """A student that is right where a token is, and wrong at padding, agrees fully."""
    output = Output(name="y", kind="classes", weight=1.0, axis=2, size=3, token_axes=(1,))
    objective = Objective(outputs=[output], comparisons=[comparison_for(output)])
    teacher = torch.eye(3).repeat(2, 1, 1) * 5
    student, mask = teacher.clone(), torch.tensor([[1, 1, 1], [1, 0, 0]])
    student[1, 1:] = torch.tensor([[9.0, 0, 0], [torch.nan] * 3])
    pair = {"y": student}, {"y": teacher}
    [found] = objective.measures(objective.sums(*pair, mask))
    assert found.agreement == 1.0
    assert found.divergence == pytest.approx(0.0, abs=1e-7)
    draws = torch.Generator()
    assert float(objective.loss(*pair, mask, draws)) == pytest.approx(0.0, abs=1e-7)
    [counted] = objective.measures(
        objective.sums({"y": student.nan_to_num()}, {"y": teacher}, None)
    )
    assert counted.agreement == pytest.approx(4 / 6)


def test_the_divergence_is_the_teacher_s_from_the_student() -> None:
    """KL(teacher || student) = sum p log(p / q) with the teacher's p, by hand."""
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.7, 0.2, 0.1])
    wanted = 0.5 * np.log(0.5 / 0.7) + 0.25 * np.log(0.25 / 0.2) + 0.25 * np.log(0.25 / 0.1)
    assert float(kl(q.log(), p.log())) == pytest.approx(wanted, rel=1e-5)
    assert float(kl(q.log() + 3, p.log() - 2)) == pytest.approx(wanted, rel=1e-5)
    masked = torch.tensor([0.0, -torch.inf])  # a class that is never chosen
    assert float(kl(masked, masked)) == 0.0


def test_yes_or_no_per_class() -> None:
    output = Output(name="y", kind="labels", weight=1.0, axis=1, size=2, token_axes=())
    objective = Objective(outputs=[output], comparisons=[comparison_for(output)])
    student = torch.tensor([[1.0, -1.0], [2.0, 2.0]])
    teacher = torch.tensor([[3.0, 1.0], [2.0, 2.0]])
    [found] = objective.measures(objective.sums({"y": student}, {"y": teacher}, None))
    assert found.agreement == 0.75
    p, q = torch.sigmoid(teacher), torch.sigmoid(student)
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert found.divergence == pytest.approx(float(each.sum(1).mean()), rel=1e-5)


def test_numbers_agree_by_the_coefficient_of_determination() -> None:
    values, ones = Values(), torch.ones(4)
    teacher = torch.tensor([1.0, 2.0, 3.0, 6.0])[:, None]
    close = teacher + torch.tensor([0.5, -0.5, 0.5, -0.5])[:, None]
    found = values.measures(values.sums(close, teacher, ones))
    assert found.agreement == pytest.approx(1 - 1.0 / 14.0)
    same = values.measures(values.sums(teacher, teacher, ones))
    assert (same.agreement, same.divergence) == (1.0, 0.0)
    flat = torch.ones(4, 1)
    assert values.measures(values.sums(flat, flat, ones)).agreement == 1.0
    assert values.measures(values.sums(teacher, flat, ones)).agreement == 0.0


def test_shapes_that_differ_are_refused() -> None:
    output = Output(name="y", kind="classes", weight=1.0, axis=1, size=3, token_axes=())
    objective = Objective(outputs=[output], comparisons=[comparison_for(output)])
    with pytest.raises(InputError, match=r"output y is \(2, 3\) .* and \(1, 3\) of the tuned"):
        objective.sums({"y": torch.zeros(2, 3)}, {"y": torch.zeros(1, 3)}, None)


def test_a_teacher_that_is_not_finite_is_refused_but_not_for_padding() -> None:
    def result(x: Tensor) -> Tensor:
        return torch.where(x[:, :2] > 7, torch.nan, x[:, :2])

    loaded = LoadedModel(source="nan", module=Fixed(y=result), kind="any", names={})
    rows = Rows(tuple({"x": torch.arange(6.0) + i} for i in range(9)), {})
    seen = survey(loaded, rows, Wanted())
    with pytest.raises(InputError, match="output y of the tuned model is not finite"):
        ask(loaded, rows, seen, lambda event: None)
