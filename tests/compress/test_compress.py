"""Compress end to end on pico models, and its parts: what changed, patterns, budgets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from click.testing import CliRunner

import kilodelta
from kilodelta.cli import main
from kilodelta.compress import Options, compress
from kilodelta.compress.distill import budget
from kilodelta.compress.distill.changes.compare import compare
from kilodelta.compress.distill.changes.patterns import patterns_for
from kilodelta.compress.distill.learn.comparisons import PULL, PULLED, comparison_for
from kilodelta.compress.distill.learn.outputs import Output
from kilodelta.errors import BaseMismatchError, InputError, OutputError, QualityError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.methods import Lora, Method, Nola, UniLora
from kilodelta.format.targets import Target
from kilodelta.models.heads import EMBEDDING
from kilodelta.verify.digests.proof import prove
from tests.support import pico


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = pico.bert_classifier(tmp_path / "base")
    return base, pico.tuned(base, tmp_path / "tuned", size=0.2)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "ran", "to", "see", "all", "of", "us")
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 4 + i % 5)) for i in range(160)]
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_distilling_brings_the_base_nearer_to_the_tuned_model(
    pair: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    base, tuned = pair
    options = Options(budget=6000, steps=120, batch=16, rate=1e-2)
    report = compress(base, tuned, tmp_path / "task.kd", inputs=texts, options=options)
    assert (tmp_path / "task.kd").stat().st_size <= 6000
    assert report.before is not None
    assert report.after is not None
    assert report.after.divergence < 0.8 * report.before.divergence
    assert report.kind == "top-1"
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    assert delta.manifest.made["agreement"] == round(report.after.agreement, 4)
    assert prove(base, tmp_path / "task.kd").result == report.result
    assert not (tmp_path / "task.kd.resume").exists()


def test_the_same_seed_gives_the_same_file(
    pair: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    options = Options(method=Nola(rank=2, bases=32), steps=12, batch=16)
    for name in ("a.kd", "b.kd"):
        compress(*pair, tmp_path / name, inputs=texts, options=options)
    assert (tmp_path / "a.kd").read_bytes() == (tmp_path / "b.kd").read_bytes()


def test_embeddings_with_labels_follow_both_as_far_as_coefficients_reach() -> None:
    labels = torch.eye(4)[:2]
    teacher = torch.tensor([[0.6, 0.0, 0.8, 0.0]])
    astray = torch.tensor([[0.6, 0.0, 0.0, 0.8]])  # the same cosines to both labels
    weights, draws = torch.ones(1), torch.Generator()
    output = Output(name=EMBEDDING, kind="embedding", weight=1, axis=1, size=4, token_axes=())

    def loss(student: torch.Tensor, coefficients: int) -> float:
        comparison = comparison_for(output, labels=labels, coefficients=coefficients)
        return float(comparison.loss(student, teacher, weights, draws))

    apart = 1 - 0.36
    assert loss(astray, 0) == pytest.approx(0, abs=1e-6)
    assert loss(astray, PULLED // 2) == pytest.approx(PULL / 2 * apart, rel=1e-5)
    assert loss(astray, PULLED) == pytest.approx(PULL * apart, rel=1e-5)
    assert loss(astray, 10 * PULLED) == pytest.approx(PULL * apart, rel=1e-5)
    assert loss(teacher, PULLED) == pytest.approx(0, abs=1e-5)
    assert loss(astray[:, [1, 0, 2, 3]], 0) > 1  # nearer to the other label


def test_without_inputs_only_svd(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    with pytest.raises(InputError, match=r"keep \d+\.\d+% of the change's energy") as caught:
        compress(base, tuned, tmp_path / "x.kd", options=Options(method=UniLora(bases=500)))
    assert "--method lora" in caught.value.fix
    errors = []
    for rank in (1, 8, 16):
        options = Options(method=Lora(rank=rank), bits=8)
        report = compress(base, tuned, tmp_path / "lora.kd", options=options, force=True)
        errors.append(report.weight_error)
    assert 1 > errors[0] > errors[1] > errors[2]
    # full rank of most matrices, rounded to 8 bits; the rest is what is not stored at all
    assert errors[2] ** 2 == pytest.approx(report.dropped_energy, abs=0.05**2)
    assert min(layer.explained for layer in report.layers) > 0.99


def test_a_poor_result_is_an_error_but_is_written(
    pair: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    options = Options(budget=4000, steps=4, min_agreement=1.0, rate=1e-6)
    with pytest.raises(QualityError, match="is written all the same"):
        compress(*pair, tmp_path / "task.kd", inputs=texts, options=options)
    assert (tmp_path / "task.kd").exists()


def test_extras_policies(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    found = {}
    for policy in ("auto", "all", "none"):
        options = Options(method=Lora(rank=1), extras=policy)
        found[policy] = compress(base, tuned, tmp_path / "t.kd", options=options, force=True)
    assert not found["auto"].extras
    assert not found["all"].dropped
    assert set(found["all"].extras) == {c.name for c in found["none"].dropped}
    wanted = found["none"].dropped[0].name
    options = Options(method=Lora(rank=1), extras=wanted)
    report = compress(base, tuned, tmp_path / "t.kd", options=options, force=True)
    assert report.extras == (wanted,)


def test_a_model_equal_to_its_base_is_refused(pair: tuple[Path, Path]) -> None:
    base = Checkpoint.open(pair[0])
    with pytest.raises(BaseMismatchError, match="holds the values of"):
        compare(base, base)


def test_patterns_are_few_and_exact() -> None:
    layers = [f"encoder.layer.{i}.{m}.weight" for i in range(12) for m in ("query", "value")]
    assert patterns_for(layers, ["embeddings.weight", "pooler.weight"]) == ("encoder.*",)
    keys = [f"encoder.layer.{i}.key.weight" for i in range(12)]
    assert patterns_for(layers, keys) == ("*.query.weight", "*.value.weight")
    assert patterns_for(["a.weight"], ["b.weight"]) == ("a.*",)


@pytest.mark.parametrize(
    ("text", "count"), [("4096", 4096), ("20KB", 20000), ("1.5 MB", 1500000), ("8KiB", 8192)]
)
def test_sizes_a_user_types(text: str, count: int) -> None:
    assert budget.parse_bytes(text) == count


def squares(count: int = 36, side: int = 384) -> list[Target]:
    return [
        Target(name=f"{i}", dtype="F32", shape=(side, side), transposed=False, index=i)
        for i in range(count)
    ]


def rest(method: Method) -> int:
    return 1000


def test_the_budget_s_rule() -> None:
    targets = squares()
    one = budget.size_of(Lora(rank=1), targets, 4)
    assert one == 36 * 384
    assert budget.choose(one + 999, rest, targets).method == UniLora(rank=4, bases=2 * (one - 1))
    four = 4 * one + 1000  # as many coefficients as the shared factors have entries
    assert budget.choose(four - 1, rest, targets).method == UniLora(rank=4, bases=8 * one - 2)
    assert budget.choose(four, rest, targets).method == Lora(rank=4)
    with pytest.raises(InputError, match="leaves 0 for coefficients"):
        budget.choose(900, rest, targets)
    with pytest.raises(InputError, match="'big' is no size"):
        budget.parse_bytes("big")


@pytest.mark.parametrize("family", ["lora", "nola", "randlora", "unilora", "vera"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_method_by_name_takes_all_that_the_budget_holds(family: str, bits: int) -> None:
    targets, limit = squares(count=3, side=64), 6000
    found = budget.choose(limit, rest, targets, bits=bits, family=family).method
    assert found.name == family
    assert budget.size_of(found, targets, bits) <= limit - 1000
    more = {"lora": {"rank": 1}, "nola": {"bases": 1}, "randlora": {"rank": -1}}
    step = more.get(family, {"bases": 1} if family == "unilora" else {"rank": 1})
    option, change = next(iter(step.items()))
    larger: Any = replace(found, **{option: getattr(found, option) + change})
    at_its_end = family in ("lora", "vera", "randlora") and getattr(larger, option) in (0, 65)
    assert at_its_end or budget.size_of(larger, targets, bits) > limit - 1000
    with pytest.raises(InputError, match=f"for coefficients of {family}"):
        budget.choose(1030, rest, targets, family=family)


def test_a_method_by_hand_that_is_larger_than_the_budget_is_refused(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    options = Options(method=Lora(rank=16), budget=1500)
    with pytest.raises(InputError, match=r"takes \d+ bytes, the budget is 1500"):
        compress(*pair, tmp_path / "task.kd", options=options)
    assert not (tmp_path / "task.kd").exists()


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_budget_is_kept_and_used_whatever_the_bits(
    bits: int, pair: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    options = Options(budget=1700, method="unilora", bits=bits, steps=4, batch=16)
    compress(*pair, tmp_path / "task.kd", inputs=texts, options=options)
    size = (tmp_path / "task.kd").stat().st_size
    # a header's padding, shorter numbers in its report, and no word of an interruption
    assert 1700 - 72 <= size <= 1700


def test_the_command_line(pair: tuple[Path, Path], texts: Path, tmp_path: Path) -> None:
    arguments = ["compress", *map(str, pair), "-o", str(tmp_path / "t.kd"), "--inputs", str(texts)]
    result = CliRunner().invoke(main, [*arguments, "--budget", "4KB", "--steps", "4", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["nbytes"]["file"] <= 4000
    again = CliRunner().invoke(main, [*arguments, "--steps", "4", "-q"])
    assert again.exit_code == OutputError.exit_code
    assert "exists already" in again.stderr
    arguments.append("--force")
    sized = [*arguments, "--method", "nola", "--budget", "3KB", "--steps", "4", "-q", "--json"]
    found = json.loads(CliRunner().invoke(main, sized).stdout)
    assert found["method"]["name"] == "nola"
    assert 2900 < found["nbytes"]["file"] <= 3000
    result = CliRunner().invoke(main, [*arguments, "--method", "lora", "--steps", "4", "-q"])
    assert "smaller" in result.stdout
    assert "not stored" in result.stdout


def test_wider_lora_learns_slower() -> None:
    assert [Lora(rank=rank).rate for rank in (1, 4, 16)] == [1e-2, 5e-3, 2.5e-3]
    assert Nola(rank=8).rate == Nola(rank=2).rate == 5e-3
