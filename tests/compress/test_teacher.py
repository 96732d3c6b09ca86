"""The teacher: shortened distributions, the cache on disk, one model in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor, nn

from kilodelta.compress import Options, compress
from kilodelta.compress.distill import pair as pairs
from kilodelta.compress.distill.job import prepare
from kilodelta.compress.distill.learn.comparisons import comparison_for, kl
from kilodelta.compress.distill.learn.objective import Measures, Objective
from kilodelta.compress.distill.learn.outputs import Output, Wanted
from kilodelta.compress.distill.learn.rows import Rows
from kilodelta.compress.distill.learn.survey import survey
from kilodelta.compress.distill.teacher import ask as asking
from kilodelta.compress.distill.teacher import store as stores
from kilodelta.compress.distill.teacher.ask import Need, Shelf, ask, estimate
from kilodelta.compress.distill.teacher.store import DiskStore, require_disk
from kilodelta.compress.distill.teacher.swap import as_tuned
from kilodelta.compress.distill.teacher.top_k import TOP_K, kl_shortened, shorten, unpack
from kilodelta.errors import InputError, OutputError
from kilodelta.format.methods import UniLora
from kilodelta.models import open_model, outputs
from kilodelta.models.loaded import LoadedModel
from kilodelta.progress import Event, silent
from tests.support import pico

LARGE = 600
"""Classes from which the small model below is shortened."""


class Words(nn.Module):
    """Logits over many classes for each of some tokens."""

    def __init__(self, classes: int = LARGE, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(4, classes)
        self.head.weight.data *= 12

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x)}


def words(classes: int = LARGE, seed: int = 0) -> LoadedModel:
    return LoadedModel(source="words", module=Words(classes, seed), kind="any", names={})


def some_rows(count: int = 10) -> Rows:
    torch.manual_seed(1)
    return Rows(tuple({"x": torch.randn(3, 4)} for _ in range(count)), {})


def shelf(cache: Path | None, **facts: str) -> Shelf:
    return Shelf(cache=cache, facts=lambda: facts, scratch=lambda: Path("/nowhere"))


def only_folder(cache: Path) -> Path:
    [folder] = cache.iterdir()
    return folder


def test_a_shortened_divergence_is_that_of_k_classes_and_the_rest() -> None:
    """Against the definition in float64, with the rest as one outcome."""
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 40), torch.randn(5, 40)
    for row in range(5):
        p, q = teacher[row].double().softmax(-1), student[row].double().softmax(-1)
        top = p.argsort(descending=True)[:7]
        lumped_p = torch.cat([p[top], (1 - p[top].sum())[None]])
        lumped_q = torch.cat([q[top], (1 - q[top].sum())[None]])
        wanted = float((lumped_p * (lumped_p / lumped_q).log()).sum())
        found = float(kl_shortened(student[row], shorten(teacher[row], 7)))
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_gradient_of_a_shortened_divergence_is_right() -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    packed = shorten(torch.randn(2, 12), 5).double()
    assert torch.autograd.gradcheck(lambda s: kl_shortened(s, packed), (student,))


def test_what_top_k_loses_of_the_whole_divergence() -> None:
    """A vocabulary of 49,152 in which the word of rank r has a probability near r^-1.5, as decoders
    have after a few words: 0.943 of the divergence, 0.99999 the gradient's cosine."""
    torch.manual_seed(0)
    ranks = -1.5 * torch.arange(1, 49_153).float().log()
    teacher = ranks[torch.randperm(49_152)] + torch.randn(4, 49_152)
    student = (teacher + 0.5 * torch.randn(4, 49_152)).requires_grad_()
    whole = kl(student, teacher).sum()
    short = kl_shortened(student, shorten(teacher, TOP_K)).sum()
    exact = torch.autograd.grad(whole, student)[0].flatten()
    near = torch.autograd.grad(short, student)[0].flatten()
    assert 0.9 < float(short.detach() / whole.detach()) <= 1
    assert float(torch.cosine_similarity(exact, near, dim=0)) > 0.999


def test_the_first_class_is_argmax_s_also_among_equals() -> None:
    logits = torch.zeros(1, 40)
    logits[0, [7, 3, 30]] = 1.0
    _, indices, _ = unpack(shorten(logits, 2))
    assert int(indices[0, 0]) == int(logits.argmax())
    assert len(set(indices[0].tolist())) == 2


def test_impossible_classes_and_certain_ones_stay_finite() -> None:
    teacher = torch.full((1, 20), -torch.inf)
    teacher[0, 4] = 0.0
    student = torch.randn(1, 20)
    found = kl_shortened(student, shorten(teacher, 3))
    assert float(found) == pytest.approx(float(-student.log_softmax(-1)[0, 4]), rel=1e-5)
    ruled_out = student.clone()
    ruled_out[0, 7] = -torch.inf
    assert bool(kl_shortened(ruled_out, shorten(teacher, 3)).isfinite())


def test_large_outputs_are_shortened_and_small_ones_stay_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, rows = words(), some_rows()
    seen = survey(model, rows, Wanted())
    assert estimate(model, rows, seen).shortened == {}
    whole, _ = ask(model, rows, seen, silent)
    monkeypatch.setattr(asking, "ROOM", 1000)
    need = estimate(model, rows, seen)
    assert need.shortened == {"logits": TOP_K}
    assert need.whole == 10 * 3 * LARGE * 4
    assert need.kept == 10 * 3 * (2 * TOP_K + 1) * 4
    short, now = ask(model, rows, seen, silent, shelf(tmp_path))
    student = outputs(words(seed=2), rows.batch([0, 1]))
    measures: list[Measures] = []
    for teacher, matched in ((whole, seen.matched), (short, now.matched)):
        objective = Objective(outputs=matched, comparisons=[comparison_for(o) for o in matched])
        assert objective.loss(student, teacher([0, 1]), None, torch.Generator()).isfinite()
        measures += objective.measures(objective.sums(student, teacher([0, 1]), None))
    assert measures[1].divergence == pytest.approx(measures[0].divergence, rel=0.1)
    assert measures[1].agreement == measures[0].agreement


def test_students_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    output = Output(name="logits", kind="classes", weight=1, axis=2, size=LARGE, token_axes=())
    for kept in (0, TOP_K):
        objective = Objective(
            outputs=[replace(output, kept=kept)],
            comparisons=[comparison_for(replace(output, kept=kept))],
        )
        theirs = torch.zeros(1, 3, 2 * kept + 1 if kept else LARGE)
        with pytest.raises(InputError, match=r"has 50 classes .* and 600 of the tuned"):
            objective.sums({"logits": torch.zeros(1, 3, 50)}, {"logits": theirs}, None)


def test_a_cache_is_reused_and_a_stopped_one_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = words(), some_rows(200)
    seen = survey(model, rows, Wanted())
    monkeypatch.setattr(stores, "PART", 1)

    def stop(event: Event) -> None:
        if event.done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(model, rows, seen, stop, shelf(tmp_path))
    done: list[int] = []
    ask(model, rows, seen, lambda event: done.append(event.done), shelf(tmp_path))
    assert done == [128, 192, 200]
    computed: list[int] = []

    def compute(*given: Any) -> Mapping[str, Tensor]:
        computed.extend(given[3])
        return compute_rows(*given)

    compute_rows = asking._compute
    monkeypatch.setattr(asking, "_compute", compute)
    monkeypatch.setattr(asking, "estimate", lambda *given: Need(whole=1, kept=1, shortened={}))
    teacher, _ = ask(model, rows, seen, silent, shelf(tmp_path))
    assert computed == [0]  # to see that the model is the one whose outputs are kept
    whole, _ = ask(words(), rows, seen, silent)
    for index in (0, 63, 64, 199):
        assert torch.equal(teacher([index])["logits"], whole([index])["logits"])


def test_a_cache_of_another_model_is_never_taken(tmp_path: Path) -> None:
    rows = some_rows()
    seen = survey(words(), rows, Wanted())
    ask(words(), rows, seen, silent, shelf(tmp_path, model="a"))
    other, _ = ask(words(seed=5), rows, seen, silent, shelf(tmp_path, model="b"))
    mine, _ = ask(words(seed=5), rows, seen, silent)
    assert torch.equal(other([0])["logits"], mine([0])["logits"])
    folder = sorted(tmp_path.iterdir())[0]
    index = json.loads((folder / stores.INDEX).read_text())
    index["facts"]["model"] = "c"
    (folder / stores.INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="outputs of another run: model"):
        DiskStore(folder, {**index["facts"], "model": "x"}, 10)


def test_a_cache_of_other_code_is_refused(tmp_path: Path) -> None:
    """Facts are equal where a function that builds the module was edited."""
    rows = some_rows()
    seen = survey(words(), rows, Wanted())
    ask(words(), rows, seen, silent, shelf(tmp_path))
    ask(words(), rows, seen, silent, shelf(tmp_path))
    with pytest.raises(InputError, match="another logits than the tuned model puts out now"):
        ask(words(seed=5), rows, seen, silent, shelf(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "bit", "gone", "index", "facts", "text", "deep", "pipe"])
def test_a_damaged_cache_is_computed_anew(tmp_path: Path, damage: str) -> None:
    model, rows = words(), some_rows()
    seen = survey(model, rows, Wanted())
    ask(model, rows, seen, silent, shelf(tmp_path))
    [part] = only_folder(tmp_path).glob("*.pt")
    index = only_folder(tmp_path) / stores.INDEX
    content = part.read_bytes()
    if damage == "cut":
        part.write_bytes(content[:-100])
    elif damage == "bit":
        part.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    elif damage == "gone":
        part.unlink()
    elif damage == "index":
        table = json.loads(index.read_text())
        table["parts"][0]["shapes"]["logits"][0] = [1, 1]
        index.write_text(json.dumps(table))
    elif damage == "facts":
        index.write_text(json.dumps({**json.loads(index.read_text()), "facts": [[1, 2]]}))
    elif damage == "pipe":
        index.unlink()
        os.mkfifo(index)
    else:
        index.write_text("[1, 2" if damage == "text" else "[" * 100_000)
    done: list[int] = []
    teacher, _ = ask(model, rows, seen, lambda e: done.append(e.done), shelf(tmp_path))
    assert done == [10]
    with torch.no_grad():
        wanted = outputs(model, rows.batch([3]))["logits"]
    assert torch.allclose(teacher([3])["logits"], wanted, atol=1e-6)


def test_a_disk_without_room_is_said_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match=r"1e\+09 GB are needed .* free") as caught:
        require_disk(tmp_path / "later" / "cache", 10**18)
    assert "--limit" in caught.value.fix
    model, rows = words(), some_rows()
    seen = survey(model, rows, Wanted())
    monkeypatch.setattr(asking, "require_disk", _with_free(100))
    done: list[int] = []
    with pytest.raises(OutputError):
        ask(model, rows, seen, lambda e: done.append(e.done), shelf(tmp_path))
    assert done == []


def test_a_cache_that_cannot_be_written_to_is_said_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    require_disk(tmp_path, 0)  # nothing is missing in it
    with pytest.raises(OutputError, match="cannot be written to, and the teacher's outputs would"):
        require_disk(tmp_path, 1)


def test_a_cache_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, rows = words(), some_rows()
    with pytest.raises(OutputError, match="cannot be kept in"):
        ask(model, rows, survey(model, rows, Wanted()), silent, shelf(tmp_path / "file"))


def _with_free(free: int) -> Any:
    def check(folder: Path, needed: int, beside: Any = ()) -> None:
        if needed > free:
            raise OutputError("no room", fix="make some")

    return check


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    base = pico.llama(tmp_path / "base")
    return base, pico.tuned(base, tmp_path / "tuned", size=0.2)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return pico.texts(tmp_path / "texts.txt", 48)


def test_one_module_is_base_and_tuned_in_turn(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def count(source: str, **given: Any) -> LoadedModel:
        opened.append(source)
        return open_model(source, **given)

    monkeypatch.setattr(pairs, "open_model", count)
    job = prepare(*models, tmp_path / "x.kd", Options(method=UniLora(bases=64)), learns=True)
    assert len(opened) == 1
    assert job.pair.student is not None
    batch = {"input_ids": torch.tensor([[4, 5, 6, 7]])}

    def logits(model: LoadedModel) -> Tensor:
        with torch.no_grad():
            return outputs(model, batch)["logits"]

    base, tuned = logits(open_model(models[0])), logits(open_model(models[1]))
    assert not torch.allclose(base, tuned)
    with as_tuned(job.pair, job.changes) as teacher:
        assert torch.equal(logits(teacher), tuned)
    assert torch.equal(logits(job.pair.student), base)
    with pytest.raises(ZeroDivisionError), as_tuned(job.pair, job.changes):
        raise ZeroDivisionError
    assert torch.equal(logits(job.pair.student), base)


def test_a_tuned_model_with_a_new_head_gives_its_memory_back(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    tuned = pico.bert_classifier(tmp_path / "tuned", seed=3)
    job = prepare(base, tuned, tmp_path / "x.kd", Options(method=UniLora(bases=64)), learns=True)
    with as_tuned(job.pair, job.changes) as teacher:
        assert teacher.module is not job.pair.student.module  # type: ignore[union-attr]
    assert {p.device.type for p in teacher.module.parameters()} == {"meta"}


def test_every_budget_and_a_resumed_run_share_one_cache(
    models: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    def make(name: str, cache: Path | None, **chosen: Any) -> list[str]:
        stages: list[str] = []
        options = Options(
            steps=6, batch=8, teacher_cache=None if cache is None else str(cache), **chosen
        )
        compress(*models, tmp_path / name, inputs=texts, options=options, force=True,
                 progress=lambda event: stages.append(event.stage))  # fmt: skip
        return stages

    cache = tmp_path / "cache"
    assert "teacher" in make("a.kd", cache, budget=3000)
    assert "teacher" not in make("b.kd", cache, budget=4000)
    assert "teacher" not in make("c.kd", cache, method=UniLora(bases=64))
    make("d.kd", None, budget=3000)
    assert (tmp_path / "a.kd").read_bytes() == (tmp_path / "d.kd").read_bytes()
    assert len(list(cache.iterdir())) == 1


def test_facts_name_what_outputs_depend_on(
    models: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    options = Options(steps=2, batch=8, budget=3000, teacher_cache=str(tmp_path / "cache"))
    compress(*models, tmp_path / "a.kd", inputs=texts, options=options)
    facts: Mapping[str, str] = json.loads(
        (only_folder(tmp_path / "cache") / stores.INDEX).read_text()
    )["facts"]
    assert facts.keys() == {
        "base model", "tuned model", "computed in", "module", "inputs", "outputs"
    }  # fmt: skip
