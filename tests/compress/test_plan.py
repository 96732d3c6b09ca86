"""`kilodelta plan`: the estimate before the first step, and the curve of size against fidelity."""

from __future__ import annotations

import gc
import json
import os
import weakref
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("transformers")

import torch
from click.testing import CliRunner, Result

from kilodelta.cli import main
from kilodelta.compress import Options, plan
from kilodelta.compress.distill.baselines import LORA, SVD
from kilodelta.compress.distill.planning import curve as curves
from kilodelta.compress.distill.planning import estimate as estimating
from kilodelta.compress.distill.planning.curve import parse_budgets
from kilodelta.compress.distill.planning.estimate import Estimate
from kilodelta.compress.distill.planning.memory import available, counting_kept
from kilodelta.compress.distill.processes import settle as settling
from kilodelta.compress.distill.report import Size
from kilodelta.errors import InputError, OutputError
from kilodelta.format.methods import Lora
from kilodelta.memory import resident
from tests.support import pico

OPTIONS = ("--steps", "8", "--batch", "8", "-q")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base, tuned model and texts; the working directory."""
    monkeypatch.chdir(tmp_path)
    base = pico.bert_classifier(tmp_path / "base")
    pico.tuned(base, tmp_path / "tuned", size=0.2)
    words = pico.WORDS.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 4 + i % 5)) for i in range(64)]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def typed(*arguments: str) -> Result:
    return CliRunner().invoke(
        main, ["plan", "base", "tuned", "--inputs", "texts.txt", *OPTIONS, *arguments]
    )


def test_kept_activations_are_counted_once_and_without_the_weights() -> None:
    layer = torch.nn.Linear(10, 20)
    x = torch.randn(3, 10, requires_grad=True)
    with counting_kept(layer) as kept:
        y = layer(x).exp()
        (y * y).sum()
    assert kept.nbytes == 4 * (3 * 10 + 3 * 20)  # the layer keeps x, exp and the product keep y
    assert kept.largest == 4 * 3 * 20


def test_what_was_counted_is_not_held() -> None:
    x = torch.randn(3, 10, requires_grad=True)
    with counting_kept(torch.nn.Linear(1, 1)):
        y = x.exp()  # keeps its own output
    held = weakref.ref(y)
    del y
    gc.collect()
    assert held() is None


def test_an_estimate_leaves_the_models_and_the_disk_alone(here: Path) -> None:
    options = Options(steps=8, batch=8, budget=3000)
    planned = plan("base", "tuned", inputs="texts.txt", options=options)
    found = planned.estimate
    assert planned.curve is None
    assert (found.steps, found.rows) == (8, 64)
    assert found.weights_bytes == 4 * sum(p.numel() for p in _parameters(here / "base"))
    assert found.coefficients > 1000
    assert found.teacher_bytes == 64 * 3 * 4
    assert not found.teacher_on_disk
    assert found.peak_bytes > found.weights_bytes + found.activations_bytes
    assert planned.total_seconds >= 8 * found.step_seconds
    assert sorted(path.name for path in here.iterdir()) == ["base", "texts.txt", "tuned"]
    larger = plan("base", "tuned", inputs="texts.txt", options=Options(batch=32, budget=3000))
    assert larger.estimate.activations_bytes > 2 * found.activations_bytes
    assert larger.estimate.steps == 800


def _parameters(folder: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(folder).parameters()


def test_what_does_not_fit_is_said_before_the_first_step(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimating, "available", lambda device: 0)
    monkeypatch.setattr(estimating, "resident", lambda: 1000)
    answer = typed()
    assert answer.exit_code == 0
    assert "warning: a step may take" in answer.stderr
    assert "smaller --batch or --max-length" in answer.stderr


def test_an_estimate_for_several_processes_divides_the_base(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Options(steps=8, batch=8, budget=3000)  # auto: on a CPU all processes map one base
    options = Options(steps=8, batch=8, budget=3000, shard="always")
    alone = plan("base", "tuned", inputs="texts.txt", options=whole).estimate
    four = plan("base", "tuned", inputs="texts.txt", options=options, processes=4).estimate
    # 2 layers: 4 matrices 16 x 16 and 2 of 16 x 24, biases of 4 x 16, 24 and 16, 2 norms of 2 x 16.
    layer = 4 * (4 * 16 * 16 + 2 * 16 * 24 + 4 * 16 + 24 + 16 + 4 * 16)
    assert four.weights_bytes == alone.weights_bytes - 2 * layer + 2 * layer // 4 + 2 * layer
    assert four.activations_bytes == -(-alone.activations_bytes // 4)
    assert (alone.sharded, four.sharded, four.processes) == (False, True, 4)
    found = plan("base", "tuned", inputs="texts.txt", options=whole, processes=4).estimate
    assert (found.weights_bytes, found.sharded) == (alone.weights_bytes, False)
    assert "in each of 2 processes" in typed("--processes", "2", "--shard", "always").stdout
    monkeypatch.setattr(estimating, "available", lambda device: 0)
    assert "or more --processes" in typed("--processes", "2", "--shard", "always").stderr


def test_a_plan_for_processes_that_cannot_be_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "9 processes share batches of 8 inputs" in typed("--processes", "9").stderr
    assert "drawn by one process, not by 2" in typed("--processes", "2", "--curve", "3KB").stderr
    shared = typed("--shard", "always")
    assert "--shard always needs several processes" in shared.stderr
    assert "give --processes N" in shared.stderr
    monkeypatch.setattr(settling, "is_quantised", lambda base: True)
    assert "a quantised base is compressed by one" in typed("--processes", "2").stderr
    monkeypatch.setattr(settling, "is_quantised", lambda base: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "a plan is made by one process, and torchrun started 2" in typed().stderr


def test_memory_that_is_not_known_is_no_warning() -> None:
    made = Estimate(
        peak_bytes=10, available_bytes=None, weights_bytes=1, activations_bytes=1, teacher_bytes=1,
        teacher_on_disk=False, shortened={}, step_seconds=1, teacher_seconds=1, steps=1,
        total_seconds=1, rows=1, coefficients=1,
    )  # fmt: skip
    assert made.fits
    assert made.warnings() == []
    assert (available() or 1) > 0
    assert resident() >= 0


def test_a_curve_is_files_a_table_and_a_picture(here: Path) -> None:
    answer = typed("--curve", "6KB,3KB", "-o", "out")
    assert answer.exit_code == 0, answer.output
    assert "2 budgets take about" in answer.stderr
    table = json.loads((here / "out" / "curve.json").read_text())
    assert [point["budget"] for point in table["sizes"]] == [3000, 6000]
    for point in table["sizes"]:
        assert (here / "out" / point["file"]).stat().st_size == point["nbytes"] <= point["budget"]
        assert point["name"] in ("unilora", "lora")
    assert table["kind"] == "top-1"
    assert not table["interrupted"]
    picture = ElementTree.fromstring((here / "out" / "curve.svg").read_text())
    assert picture.tag.endswith("svg")
    assert {size["name"] for size in table["beside"]} == {SVD}  # without being asked for
    assert SVD in (here / "out" / "curve.svg").read_text()
    assert "var(" not in (here / "out" / "curve.svg").read_text()
    assert len(list((here / "out" / "teacher").iterdir())) == 1  # both read one cache
    again = typed("--curve", "6KB,3KB", "-o", "out")
    assert again.exit_code != 0
    assert "holds a curve already" in again.stderr


def test_a_curve_goes_on_where_it_ended(here: Path) -> None:
    assert typed("--curve", "3KB", "-o", "out").exit_code == 0
    before = (here / "out" / "3000.kd").stat().st_mtime_ns
    answer = typed("--curve", "3KB,5KB", "-o", "out", "--resume", "--json")
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    assert [point["budget"] for point in result["sizes"]] == [3000, 5000]
    assert result["curve"]["kind"] == "top-1"
    sizes = [tuple(size.values()) for size in result["curve"]["beside"]]
    assert len(sizes) == 1  # rank 3, the classifier's, is all that any budget buys: said once
    assert (here / "out" / "3000.kd").stat().st_mtime_ns == before


def test_points_of_another_run_are_not_kept(here: Path) -> None:
    assert typed("--curve", "3KB", "-o", "out").exit_code == 0
    written = (here / "out" / "curve.json").read_text()
    other = typed("--curve", "3KB,5KB", "-o", "out", "--resume", "--seed", "4", "--lr", "0.1")
    assert other.exit_code == 9
    assert "out holds a curve of a run with other --lr, --seed" in other.stderr
    texts = (here / "texts.txt").read_text()
    (here / "texts.txt").write_text(texts + "seven birds sing\n")
    assert "run with other inputs" in typed("--curve", "3KB", "-o", "out", "--resume").stderr
    assert (here / "out" / "curve.json").read_text() == written
    (here / "texts.txt").write_text(texts)
    elsewhere = typed(
        "--curve", "3KB", "-o", "out", "--resume", "--device", "cpu", "--threads", "1"
    )
    assert elsewhere.exit_code == 0, elsewhere.stderr


def test_what_says_where_a_curve_lies_is_refused_without_one() -> None:
    for given in (["-o", "out"], ["--force"], ["--resume"]):
        answer = typed(*given)
        assert answer.exit_code == 9
        assert f"{given[0]} belongs to --curve" in answer.stderr


def test_what_stands_beside_a_curve_is_joined_by_its_bytes() -> None:
    """Each budget measures several; in that order a picture's line would go to and fro."""
    found = [(SVD, 2584), (LORA, 3900), (SVD, 11944), (SVD, 7248), (LORA, 900), (SVD, 7248)]
    sizes = [Size(name=name, nbytes=nbytes, agreement=0.5) for name, nbytes in found]
    assert [(size.name, size.nbytes) for size in curves._in_order(sizes)] == [
        *((SVD, nbytes) for nbytes in (2584, 7248, 11944)),
        *((LORA, nbytes) for nbytes in (900, 3900)),
    ]


POINT = {
    "name": "nola", "budget": 4096, "file": "4096.kd", "nbytes": 4000,
    "method": {"name": "nola", "rank": 2}, "bits": 8, "agreement": 0.9, "divergence": 0.1,
    "steps": 4, "seconds": 1.5, "result": "sha256:0", "warnings": ["few steps"],
}  # fmt: skip
TABLE = {"kind": "classes", "base_agreement": 0.5, "tuned_bytes": 9, "sizes": [POINT]}


def test_a_table_of_another_machine_is_read_field_by_field(tmp_path: Path) -> None:
    place = tmp_path / curves.TABLE
    beside = {"name": "svd", "nbytes": 5, "agreement": 0.5}
    place.write_text(json.dumps({**TABLE, "beside": [beside]}))
    point, general = curves._points_of(tmp_path)[4096]
    assert (point.nbytes, point.warnings, general["kind"]) == (4000, ("few steps",), "classes")
    assert [size.name for size in curves._beside_of(tmp_path)] == ["svd"]
    values: tuple[Any, ...] = (None, [1])
    odd: list[Any] = [{**TABLE, key: value} for key in TABLE for value in (*values, {"a": 1})]
    odd += [{**TABLE, "sizes": [{**POINT, key: value}]} for key in POINT for value in values]
    odd += [{**TABLE, "sizes": [{**POINT, "more": 1}]}, {**TABLE, "sizes": [{}]}, [], 7]
    for table in odd:
        place.write_text(json.dumps(table))
        assert curves._points_of(tmp_path) == {}, table
        assert curves._beside_of(tmp_path) == ()
    place.write_text("[" * 100_000)
    assert curves._beside_of(tmp_path) == ()
    place.unlink()
    os.mkfifo(place)
    assert curves._beside_of(tmp_path) == ()


def test_budgets_as_a_user_types_them() -> None:
    assert parse_budgets("50KB,4KB, 12KB") == (4000, 12000, 50000)
    for wrong, why in (("4KB,4000", "some of them equal"), ("4KB,big", "is no size"),
                       (",".join(f"{n}KB" for n in range(1, 19)), "18 budgets")):  # fmt: skip
        with pytest.raises(InputError, match=why):
            parse_budgets(wrong)


def test_a_budget_that_holds_nothing_is_refused_before_the_estimate(here: Path) -> None:
    said: list[Any] = []
    with pytest.raises(InputError, match="a budget of 100 bytes leaves 0 for coefficients"):
        plan("base", "tuned", inputs="texts.txt", curve="4KB,100", announce=said.append)
    assert not said
    assert not (here / "curve").exists()


def test_what_makes_no_sense_is_refused_before_models_are_opened(tmp_path: Path) -> None:
    for options in (Options(budget=3000), Options(method=Lora(rank=2))):
        with pytest.raises(InputError, match="a curve has its own budgets"):
            plan("nowhere", "nowhere", inputs="none.txt", curve="4KB", options=options)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is no folder"):
        plan("nowhere", "nowhere", inputs="none.txt", curve="4KB", out=tmp_path / "file")
    with pytest.raises(InputError, match=r"none\.txt is no file"):
        plan("nowhere", "nowhere", inputs="none.txt")


def test_a_plan_of_a_quantised_base_is_of_its_values(here: Path) -> None:
    from kilodelta.grid.quantise import quantise_folder

    def is_query(name: str) -> bool:
        return name.endswith("query.weight")

    quantise_folder(here / "base", here / "base-fp8", "fp8", is_query)
    options = Options(steps=8, batch=8, method=Lora(rank=2), extras="none")
    planned = plan("base-fp8", "tuned", inputs="texts.txt", options=options).estimate
    floats = plan("base", "tuned", inputs="texts.txt", options=options).estimate
    assert planned.weights_bytes == floats.weights_bytes
    assert planned.coefficients == floats.coefficients
    assert sorted(path.name for path in here.iterdir()) == [
        "base", "base-fp8", "texts.txt", "tuned",
    ]  # fmt: skip
