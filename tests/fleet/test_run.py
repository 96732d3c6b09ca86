"""A fleet of pico models, run for real: shared work once, resumed, killed, in shards, on Ray."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tomllib")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
import kilodelta
from kilodelta import memory
from kilodelta.errors import ExportError, InputError, OutputError
from kilodelta.export import one_graph, pipeline
from kilodelta.export.pipeline import export
from kilodelta.export.tensorrt import build as engines
from kilodelta.files.tensor import RawTensor
from kilodelta.fleet import (
    child,
    cluster,
    gpus,
    local,
    make_plan,
    on_ray,
    processes,
    read_fleet,
    run,
    work,
)
from kilodelta.fleet.cluster import lacks, machines_of, options_of, require_resources
from kilodelta.fleet.local import choose_jobs, shard_of
from kilodelta.fleet.on_ray import _started
from kilodelta.fleet.processes import Children
from kilodelta.fleet.record import AGAIN, DONE, NEW, RECORD
from kilodelta.fleet.server import serve
from kilodelta.fleet.status import status_of
from kilodelta.fleet.task import Task, memory_of
from kilodelta.format.file import load
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from tests.doubles.child_work import DyingOnce, ending, seen, slow_disk
from tests.support import making, pico

COUNT = 3
LAYERS = Patterns(include=("bert.encoder.*.weight",), exclude=("*LayerNorm*",))
OTHER = Patterns(include=("encoder.*.weight",), exclude=("*LayerNorm*",))
FLEET = """
version = 1
[base.mini]
path = "base"
[[fine-tunes]]
deltas = ["ready/*.kd"]
[target.merged]
kind = "merge"
[target.onnx]
kind = "onnx"
[target.lora]
kind = "peft"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three ready fine-tunes, and the file that names them."""
    folder = tmp_path_factory.mktemp("fleet")
    pico.bert_classifier(folder / "base")
    (folder / "ready").mkdir()
    for number in range(COUNT):
        tune = making.delta(folder / "base", Lora(rank=2), patterns=LAYERS, seed=number + 1)
        tune.save(folder / "ready" / f"t{number}.kd")
    (folder / "fleet.toml").write_text(FLEET)
    return folder


def plan_of(world: Path, out: Path) -> Any:
    return make_plan(read_fleet(world / "fleet.toml"), out)


def digests(out: Path) -> dict[str, str]:
    """Of every result's bytes; records hold times and do not count."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in (RECORD, local.ANSWERS)
    }


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole fleet, run once."""
    out = tmp_path_factory.mktemp("out") / "fleet"
    done = run(plan_of(world, out), jobs=2)
    assert done.failed == ()
    assert len(done.answers) == 3 * COUNT + 1
    return out


def shared_of(finished: Path, out: Path) -> Path:
    """A folder of results that has what fine-tunes share, whose export takes longest."""
    import shutil

    shutil.copytree(finished / "bases", out / "bases")
    return out


def graph_compiler(patched: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a double in TensorRT's place; return what it was asked for.

    Its engines say from which bytes they were built.
    """
    asked: list[dict[str, Any]] = []

    def built(trt: Any, onnx: Path, engine: Path, **options: Any) -> int:
        asked.append({name: options[name] for name in ("capabilities", "profile")})
        return engine.write_bytes(hashlib.sha256(onnx.read_bytes()).digest())

    trt = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7.1")
    for module in (pipeline, one_graph):
        patched.setattr(module, "choose", lambda flavour, capabilities, dtypes: trt)
    for module in (engines, one_graph):
        patched.setattr(module, "build", built)
    return asked


@pytest.fixture(scope="module")
def exported(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The command's export of one fine-tune, and what its engine was to be."""
    out = tmp_path_factory.mktemp("exported") / "out"
    with pytest.MonkeyPatch.context() as patched:
        asked = graph_compiler(patched)
        export(world / "base", world / "ready" / "t1.kd", out, onnx=True, tensorrt=["sm86"])
    return out, asked


def test_results_are_those_of_the_commands(
    world: Path, finished: Path, exported: tuple[Path, Any], tmp_path: Path
) -> None:
    """The patched ONNX file is, byte for byte, an export of the merged model."""
    place = finished / "fine-tunes" / "t1"
    [single] = exported[0].glob("*.onnx")
    assert (place / "onnx" / "model.onnx").read_bytes() == single.read_bytes()
    kilodelta.merge(world / "base", world / "ready" / "t1.kd", tmp_path / "merged")
    [one] = (place / "merged" / "merged").glob("*.safetensors")
    [two] = (tmp_path / "merged").glob("*.safetensors")
    assert one.read_bytes() == two.read_bytes()
    assert (place / "lora" / "adapter" / "adapter_config.json").exists()


def test_an_engine_is_built_from_the_graph_that_fine_tunes_share(
    world: Path,
    finished: Path,
    exported: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is traced, and the folder is an export's, byte for byte."""
    asked = graph_compiler(monkeypatch)
    monkeypatch.setattr(pipeline, "open_merged", None)  # what traces needs a model
    given = {
        "base": str(world / "base"),
        "delta": str(world / "ready" / "t1.kd"),
        "template": str(finished / "bases" / "mini" / "onnx-fp32"),
        "model": None,
        "inputs": None,
        "options": {"for": ["sm86"]},
    }
    assert work.tensorrt(given, tmp_path) == {"artefacts": 2, "traced": False}
    assert asked == exported[1]
    names = ["manifest.json", "model.fp32.engine", "model.fp32.onnx"]
    for folder in (tmp_path / "engine", exported[0]):
        assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        assert (tmp_path / "engine" / name).read_bytes() == (exported[0] / name).read_bytes(), name


def test_what_changes_the_graph_is_exported_by_itself(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    template, delta = finished / "bases" / "mini" / "onnx-fp32", load(world / "ready" / "t1.kd")
    assert one_graph.is_takeable(template, delta)
    other = dataclasses.replace(delta.manifest, config={"hidden_act": "relu"})
    assert not one_graph.is_takeable(template, dataclasses.replace(delta, manifest=other))
    head = {"new.weight": RawTensor.of(np.ones((2, 2), np.float32))}
    assert not one_graph.is_takeable(template, dataclasses.replace(delta, extras=head))
    assert not one_graph.is_takeable(tmp_path, delta)
    with pytest.raises(ExportError, match="an encoder and a decoder") as error:
        one_graph.patch_shared(tmp_path, delta, tmp_path / "x.onnx")
    assert "inputs" in error.value.fix


def test_a_second_run_does_nothing(world: Path, finished: Path) -> None:
    plan = plan_of(world, finished)
    assert {s.status for s in plan.states.values()} == {DONE}
    before = digests(finished)
    again = run(plan, jobs=1)
    assert again.answers == {}
    assert again.done_before == 3 * COUNT + 1
    assert digests(finished) == before


def test_what_is_lost_is_made_again_and_nothing_else(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "fine-tunes" / "t0" / "onnx" / "model.onnx").unlink()
    shutil.rmtree(out / "fine-tunes" / "t2" / "merged")
    record = out / "fine-tunes" / "t1" / "lora" / RECORD
    facts = json.loads(record.read_text())
    facts["id"], facts["key"]["options"] = "0" * 64, {"dtype": "fp16"}
    record.write_text(json.dumps(facts))
    plan = plan_of(world, out)
    told = {t.name: plan.states[t.id] for t in plan.open_tasks()}
    assert {n: s.status for n, s in told.items()} == {
        "t0/onnx": AGAIN,
        "t1/lora": AGAIN,
        "t2/merged": NEW,
    }
    assert told["t0/onnx"].why == "model.onnx is missing"
    assert told["t1/lora"].why == "changed: options"
    assert len(run(plan, jobs=2).answers) == 3
    assert digests(out) == digests(finished)


def test_a_failure_stops_what_needs_it_and_nothing_else(
    world: Path, finished: Path, tmp_path: Path
) -> None:
    import shutil

    place = tmp_path / "world"
    shutil.copytree(world, place)
    other = pico.bert(tmp_path / "other")
    making.delta(other, Lora(rank=1), patterns=OTHER).save(place / "ready" / "t1.kd")
    done = run(plan_of(place, shared_of(finished, tmp_path / "out")), jobs=1)
    assert {a["name"] for a in done.failed} == {"t1/merged", "t1/onnx", "t1/lora"}
    assert all("is not the base" in a["error"] or "base" in a["error"] for a in done.failed)
    assert {a["exit_code"] for a in done.failed} == {5}
    assert done.skipped == {}
    assert not (tmp_path / "out" / "fine-tunes" / "t1" / "merged").exists()


def test_what_depends_on_a_failure_is_skipped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any, task: Any, stop: Any) -> dict[str, Any]:
        answer = {"id": task.id, "name": task.name, "seconds": 0.0, "exit_code": 11}
        status = "failed" if task.kind == "onnx-base" else "done"
        return {**answer, "status": status, "error": "x", "fix": "y"}

    monkeypatch.setattr(Children, "do", failing)
    done = run(plan_of(world, tmp_path / "out"), jobs=1)
    assert done.skipped == {f"t{i}/onnx": "mini/onnx-fp32" for i in range(COUNT)}
    saved = json.loads((tmp_path / "out" / local.ANSWERS).read_text())
    assert saved["skipped"] == done.skipped


def test_a_failed_run_prints_one_json_document(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from kilodelta.cli import main

    def failing(self: Any, task: Any, stop: Any) -> dict[str, Any]:
        answer = {"id": task.id, "name": task.name, "seconds": 0.0, "exit_code": 11}
        return {**answer, "status": "failed", "error": "x", "fix": "y"}

    monkeypatch.setattr(Children, "do", failing)
    given = ["fleet", "run", str(world / "fleet.toml"), "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 17
    assert len(json.loads(done.stdout)["failed"]) == 2 * COUNT + 1


@pytest.mark.parametrize("status", ["failed", "done"])
def test_a_full_disk_does_not_hide_which_tasks_failed(
    status: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own note cannot be written either; where nothing else failed, that is the fault."""

    def answering(self: Any, task: Any, stop: Any) -> dict[str, Any]:
        answer = {"id": task.id, "name": task.name, "seconds": 0.0, "exit_code": 8}
        return {**answer, "status": status, "error": "No space left on device", "fix": "y"}

    def full(path: Path, data: bytes) -> None:
        raise OutputError(f"{path} cannot be written: No space left on device", fix="make room")

    monkeypatch.setattr(Children, "do", answering)
    monkeypatch.setattr("kilodelta.files.staging.write", full)
    plan = plan_of(world, tmp_path / "out")
    if status == "done":
        with pytest.raises(OutputError, match=r"run\.json cannot be written: No space"):
            run(plan, jobs=1)
    else:
        assert {a["name"] for a in run(plan, jobs=1).failed} >= {"t0/merged", "t1/merged"}


def test_a_killed_child_costs_its_own_task(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first child of one task kills itself; the task is tried again, the rest goes on."""
    mark = tmp_path / "killed-once"
    monkeypatch.setattr(child, "do", DyingOnce("t1/merged", mark))
    done = run(plan_of(world, shared_of(finished, tmp_path / "out")), jobs=2)
    assert mark.exists()
    assert done.failed == ()
    assert digests(tmp_path / "out") == digests(finished)


@pytest.mark.parametrize(
    ("how", "what", "fix"),
    [
        (-signal.SIGKILL, "signal SIGKILL", "give it more memory"),
        (-signal.SIGABRT, "signal SIGABRT", "if it ends so once more, report it"),
        (1, "exit code 1", "if it ends so once more, report it"),
    ],
)
def test_a_child_without_an_answer_says_how_it_ended(
    how: int, what: str, fix: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "do", ending)
    (tmp_path / "how").write_text(str(how))
    [task, *_] = plan_of(world, tmp_path / "out").tasks
    with Children([task], tmp_path, 1) as children:
        answer = children.do(task, threading.Event())
    assert what in answer["error"]
    assert fix in answer["fix"]


def test_shards_together_make_the_whole(world: Path, finished: Path, tmp_path: Path) -> None:
    plan = plan_of(world, shared_of(finished, tmp_path / "out"))
    parts = [shard_of(plan.tasks, (k, 2)) for k in (1, 2)]
    tunes = [{t.fine_tune for t in part if t.fine_tune} for part in parts]
    assert tunes == [{"t0", "t2"}, {"t1"}]
    for k in (1, 2):
        assert run(plan_of(world, tmp_path / "out"), jobs=1, shard=(k, 2)).failed == ()
    assert digests(tmp_path / "out").items() >= digests(finished).items()
    with pytest.raises(InputError, match="no shard 3 of 2"):
        shard_of(plan.tasks, (3, 2))


def test_the_status_puts_the_worst_first(world: Path, finished: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "fine-tunes" / "t2" / "merged")
    plan = plan_of(world, out)
    [lost] = plan.open_tasks()
    note = {"failed": [{"id": lost.id, "error": "no room", "fix": "make room"}], "skipped": {}}
    (out / local.ANSWERS).write_text(json.dumps(note))
    (out / "run-1-of-2.json").write_text("{")
    found = status_of(plan)
    assert found["rows"][0]["fine_tune"] == "t2"
    assert found["rows"][0]["why"] == "no room; make room"
    assert found["counts"] == {"failed": 1, "not begun": 0, "open": 0, "done": 3 * COUNT}
    assert all(row["nbytes"] > 0 for row in found["rows"][1:])
    parity = {row["target"]: row["parity"] for row in found["rows"][1:]}
    assert (parity["merged"], parity["onnx"], parity["onnx-fp32"]) == ("exact", "exact", "")
    assert 0 <= float(parity["lora"]) < 1e-3


def test_a_plan_estimates_by_what_is_done(world: Path, finished: Path, tmp_path: Path) -> None:
    import shutil

    fresh = plan_of(world, tmp_path / "none").to_json()
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in fresh["tasks"])
    assert fresh["expected"]["measured"] == 0
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "fine-tunes" / "t2" / "merged")
    plan = plan_of(world, out)
    [lost] = plan.open_tasks()
    expected = plan.estimates()[lost.id]
    like = json.loads((out / "fine-tunes" / "t1" / "merged" / RECORD).read_text())
    assert expected.measured
    assert expected.nbytes == sum(like["files"].values())
    told = plan.to_json()
    assert told["expected"] == {
        "seconds": round(expected.seconds, 1),
        "bytes": expected.nbytes,
        "measured": 1,
    }
    assert {row["seconds"] for row in told["tasks"] if row["status"] == DONE} == {None}


BUNDLED = """
version = 1
[base.mini]
path = "base"
[[fine-tunes]]
deltas = ["ready/*.kd"]
[target.cpu]
kind = "release"
version = 7
probe = false
bundle = { mode = "patch" }
[target.later]
kind = "release"
version = 8
probe = false
bundle = { mode = "patch" }
"""


@pytest.fixture
def bundled(world: Path) -> Path:
    """A fleet of releases for one device folder."""
    file = world / "bundled.toml"
    file.write_text(BUNDLED)
    return file


def test_a_device_folder_is_planned_once_for_all_releases(bundled: Path, tmp_path: Path) -> None:
    """Those of other versions as well; another kind of device has another one."""
    plan = make_plan(read_fleet(bundled), tmp_path / "out")
    [shared] = [t for t in plan.tasks if t.kind == "bundle"]
    releases = [t for t in plan.tasks if t.kind == "release"]
    assert len(releases) == 2 * COUNT
    assert all(t.needs == (shared.id,) for t in releases)
    assert shard_of(plan.tasks, (2, 2))[0] == shared
    bundled.write_text(BUNDLED.replace('"patch" }', '"adapter" }', 1))
    changed = make_plan(read_fleet(bundled), tmp_path / "out")
    assert len([t for t in changed.tasks if t.kind == "bundle"]) == 2


@pytest.mark.slow
def test_a_device_takes_the_releases_of_a_fleet(bundled: Path, tmp_path: Path) -> None:
    from kilodelta.device import apply

    plan = make_plan(read_fleet(bundled), tmp_path / "out")
    [shared] = [t for t in plan.tasks if t.kind == "bundle"]
    done = run(plan, jobs=1)
    assert done.failed == (), done.failed
    device = tmp_path / "out" / shared.place / "device"
    for name, version in (("cpu", 7), ("later", 8)):
        released = tmp_path / "out" / "fine-tunes" / "t1" / name / f"t1-{version}.kd"
        assert apply(device, released).result_proved


def test_libraries_that_few_tasks_need_are_not_loaded_for_all(world: Path, tmp_path: Path) -> None:
    """The one export of the base loads torch itself; a compression for each fine-tune shares it."""
    tasks = plan_of(world, tmp_path / "out").tasks
    assert processes.kinds_alone(tasks, 2) == {"onnx-base"}
    many = [dataclasses.replace(t, kind="compress") if t.kind == "merge" else t for t in tasks]
    assert processes.kinds_alone(many, 2) == frozenset()
    [export] = [t for t in tasks if t.kind == "onnx-base"]
    assert processes.kinds_alone([export], 2) == frozenset()


def test_what_others_wait_for_begins_first(world: Path, tmp_path: Path) -> None:
    """The export stands behind a merge in the plan; a chain's first task goes before its second."""
    tasks = plan_of(world, tmp_path / "out").tasks
    assert [t.kind for t in tasks[:2]] == ["merge", "onnx-base"]
    ordered = local._longest_way_first(tasks)
    assert ordered[0].kind == "onnx-base"
    assert ordered[1:] == [t for t in tasks if t.kind != "onnx-base"]
    alone, delta = (dataclasses.replace(TASK, id=name) for name in ("alone", "delta"))
    bundle = dataclasses.replace(TASK, id="bundle", needs=("done before",))
    release = dataclasses.replace(TASK, id="release", needs=("delta", "bundle"))
    signed = dataclasses.replace(TASK, id="signed", needs=("release",))
    ordered = local._longest_way_first([alone, delta, bundle, release, signed])
    assert [t.id for t in ordered] == ["delta", "bundle", "release", "alone", "signed"]


def test_jobs_follow_cores_and_memory(world: Path, tmp_path: Path) -> None:
    tasks = plan_of(world, tmp_path / "out").tasks
    assert choose_jobs(tasks, 5) == 5
    assert 1 <= choose_jobs(tasks, None) <= (os.cpu_count() or 1)
    with pytest.raises(InputError, match="0 jobs"):
        choose_jobs(tasks, 0)


def test_one_task_at_once_for_each_gpu(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tasks compute on GPUs; each child sees another one."""
    tasks = plan_of(world, tmp_path / "out").tasks
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    assert gpus.gpus_here() == ("0", "1")
    assert choose_jobs(tasks, None) > 2
    taking = [dataclasses.replace(t, resources={"GPU": 1}) for t in tasks]
    assert choose_jobs(taking, None) == 2
    with Children(taking, tmp_path, 3) as children:
        assert [children._gpus.get() for _ in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv(gpus.VISIBLE, "GPU-a")
    assert choose_jobs(taking, None) == 1
    with Children(tasks, tmp_path, 3) as children:
        assert children._gpus.empty()


def test_a_child_sees_its_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "do", seen)
    monkeypatch.setenv(gpus.VISIBLE, "3")
    with Children([GPU_TASK], Path("out"), 1) as children:
        answer = children.do(GPU_TASK, threading.Event())
        assert answer["gpu"] == "3"
        assert answer["collects"] == serve.COLLECT
        assert children._gpus.get() == "3"


def test_each_task_has_a_process_and_the_next_one_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three tasks, three processes; while one works, one more waits, and no more than are needed.

    One that is killed while it waits costs no task, and none is left at the end.
    """
    monkeypatch.setattr(child, "do", seen)
    tasks = [dataclasses.replace(TASK, id=str(n)) for n in range(3)]
    stop = threading.Event()
    with Children(tasks, Path("out"), 1) as children:
        used = [children.do(tasks[0], stop)["process"]]
        [waiting] = children._ready
        used.append(children.do(tasks[1], stop)["process"])
        assert used[1] == waiting.process.pid
        [waiting] = children._ready
        os.kill(waiting.process.pid, signal.SIGKILL)
        assert waiting.process.exit_code(patient=True) == -signal.SIGKILL
        answer = children.do(tasks[2], stop)
        used.append(answer["process"])
        assert children._ready == []
    assert len({*used, waiting.process.pid}) == 4
    assert os.getpid() not in used
    for one in {*used, waiting.process.pid}:
        with pytest.raises(ProcessLookupError):
            os.kill(one, 0)


def test_light_tasks_let_the_export_that_others_wait_for_go_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With two workers that share a core, or the machine's other work, it was last to end."""
    monkeypatch.setattr(child, "do", seen)
    stop, here = threading.Event(), os.nice(0)
    merges = [dataclasses.replace(TASK, id=str(n), kind="merge") for n in range(2)]
    export = dataclasses.replace(TASK, id="3", kind="onnx-base")
    with Children([*merges, export], Path("out"), 1) as children:
        assert children.do(merges[0], stop)["niceness"] == min(here + 10, 19)
        assert children.do(export, stop)["niceness"] == here
    with Children(merges, Path("out"), 1) as children:
        assert children.do(merges[0], stop)["niceness"] == here


@pytest.mark.parametrize(("kind", "begun"), [("merge", 2), ("compress", 1)])
def test_a_task_that_waits_for_the_disk_lets_the_next_one_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, begun: int
) -> None:
    """One worker: the second begins when the first is computed, unless that has torch loaded."""
    monkeypatch.setattr(child, "do", slow_disk)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setattr(gpus, "DEVICES", tmp_path)
    tasks = [dataclasses.replace(TASK, id=str(n), kind=kind) for n in range(2)]
    stop = threading.Event()
    with Children(tasks, tmp_path, 1) as children, ThreadPoolExecutor(2) as pool:
        done = [pool.submit(children.do, task, stop) for task in tasks]
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < begun and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.2 * (begun == 1))
        assert len(list(tmp_path.iterdir())) == begun
        (tmp_path / "ready").touch()
        assert len({one.result()["process"] for one in done}) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"0", "1", "ready"}


def test_a_container_with_little_memory_gets_fewer_jobs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine's free memory is not the container's, where the kernel would end the work."""
    tasks = plan_of(world, tmp_path / "out").tasks
    (tmp_path / "max").write_text(f"{max(map(memory_of, tasks)) * 3 // 2}\n")
    (tmp_path / "now").write_text("0\n")
    monkeypatch.setattr(memory, "_GROUPS", ((tmp_path / "max", tmp_path / "now"),))
    assert choose_jobs(tasks, None) == 1


def test_a_tuned_model_is_compressed_and_an_option_makes_it_again(tmp_path: Path) -> None:
    base = pico.bert_classifier(tmp_path / "base")
    pico.bert_classifier(tmp_path / "tuned" / "one", seed=1)
    (tmp_path / "texts.txt").write_text("\n".join(pico.TEXTS * 8) + "\n")
    text = (
        'version = 1\n[base.b]\npath = "base"\ninputs = "texts.txt"\n[[fine-tunes]]\n'
        'tuned = ["tuned/*"]\ncompress = { method = "lora", rank = 2, steps = 4, batch = 4 }\n'
        '[target.m]\nkind = "merge"\n'
    )
    (tmp_path / "fleet.toml").write_text(text)
    done = run(plan_of(tmp_path, tmp_path / "out"), jobs=1)
    assert done.failed == (), done.failed
    file = tmp_path / "out" / "fine-tunes" / "one" / "delta" / "one.kd"
    assert kilodelta.inspect(file).base["root"] == kilodelta.digest(base).root
    (tmp_path / "fleet.toml").write_text(text.replace("steps = 4", "steps = 6"))
    plan = plan_of(tmp_path, tmp_path / "out")
    told = {t.name: plan.states[t.id].why for t in plan.open_tasks()}
    assert told == {"one/delta": "changed: options", "one/m": "changed: delta"}


def test_a_base_that_differs_from_the_plans_is_those_tasks_failure(tmp_path: Path) -> None:
    """Exchanged after the plan was made: nothing is made of the other base."""
    base = pico.bert_classifier(tmp_path / "base")
    (tmp_path / "ready").mkdir()
    making.delta(base, Lora(rank=1), patterns=LAYERS).save(tmp_path / "ready" / "t.kd")
    (tmp_path / "fleet.toml").write_text(FLEET)
    plan = plan_of(tmp_path, tmp_path / "out")
    pico.bert_classifier(tmp_path / "other", seed=9)
    (tmp_path / "other" / "model.safetensors").replace(base / "model.safetensors")
    for task in plan.tasks:
        if task.kind in ("onnx-base", "merge"):
            answer = child.do(task.to_json(), tmp_path / "out")
            assert (answer["status"], answer["exit_code"]) == ("failed", 5)
            assert "the plan was made with sha256:" in answer["error"]
    assert not any((tmp_path / "out").rglob("*.onnx"))


TASK = Task(id="0", kind="merge", name="t/m", place="x", key={}, params={}, nbytes=1 << 20)
GPU_TASK = dataclasses.replace(TASK, resources={"GPU": 1})
SMALL = {"CPU": 2.0, "memory": float(8 << 30)}
ORIN = {"CPU": 1.0, "memory": float(4 << 30), "sm87": 1.0}


def test_a_target_that_the_cluster_cannot_build_is_said_before_anything_starts() -> None:
    orin = dataclasses.replace(TASK, name="t/orin", resources={"sm87": 1})
    require_resources([TASK], [SMALL])
    require_resources([TASK, orin], [SMALL, ORIN])
    with pytest.raises(InputError, match=r"t/orin needs 1 of 'sm87', and the nearest .* has 0"):
        require_resources([TASK, orin], [SMALL])
    with pytest.raises(InputError, match=r"needs 3 of 'CPU', and the nearest machine .* has 2"):
        require_resources([TASK], [SMALL], cpus=3)
    with pytest.raises(InputError, match=r"of 'memory', and the nearest"):
        require_resources([dataclasses.replace(TASK, nbytes=1 << 40)], [SMALL])


def test_what_only_two_machines_have_together_is_missing() -> None:
    """Four processors in all, and one Orin: neither machine has two of them and the Orin."""
    orin = [dataclasses.replace(TASK, name=f"t{i}/orin", resources={"sm87": 1}) for i in range(5)]
    [one] = lacks(orin, [SMALL, ORIN], cpus=2)
    assert (one.resource, one.needed, one.most, len(one.tasks)) == ("CPU", 2.0, 1.0, 5)
    assert str(one).startswith("t0/orin, t1/orin, t2/orin and 2 more need 2 of 'CPU'")
    assert lacks(orin, [{**SMALL, "sm87": 1.0}], cpus=2) == ()
    assert [one.resource for one in lacks([TASK], [])] == ["CPU", "memory"]


def test_rays_own_resources_are_its_own_options() -> None:
    """Ray refuses `GPU` among custom resources, and takes fractions."""
    task = dataclasses.replace(TASK, resources={"GPU": 0.5, "sm87": 1, "memory": 1e9})
    assert options_of(task, cpus=2) == {
        "num_cpus": 2.0,
        "num_gpus": 0.5,
        "memory": 10**9,
        "name": "t/m",
        "resources": {"sm87": 1.0},
    }
    assert options_of(dataclasses.replace(TASK, resources={"CPU": 4}))["num_cpus"] == 4.0


class FakeRay:
    """A double of a cluster that loses its machine while a task waits."""

    def __init__(self, *machines: dict[str, float]) -> None:
        self.machines = list(machines)

    def nodes(self) -> list[dict[str, Any]]:
        gone = {"Alive": False, "Resources": ORIN}
        return [gone, *({"Alive": True, "Resources": one} for one in self.machines)]

    def is_initialized(self) -> bool:
        return True


def test_a_task_whose_machine_has_left_fails_and_does_not_wait() -> None:
    orin = dataclasses.replace(TASK, name="t/orin", resources={"sm87": 1})
    ray = FakeRay(SMALL, ORIN)
    watch = on_ray._Watch(ray, 1)
    running = {"reference": orin, "other": TASK}
    assert watch.stranded(running) == {}
    ray.machines.remove(ORIN)
    assert watch.stranded(running) == {}  # it may be starting again
    [(reference, answer)] = watch.stranded(running).items()
    assert (reference, answer["status"]) == ("reference", "failed")
    assert "a machine has left the cluster: t/orin needs 1 of 'sm87'" in answer["error"]


def test_a_plan_for_a_cluster_names_what_it_lacks(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from kilodelta.cli import main

    @contextlib.contextmanager
    def double(address: str | None) -> Iterator[Any]:
        assert address == "auto"
        yield FakeRay({"CPU": 64.0, "memory": float(1 << 40)})

    monkeypatch.setattr(cluster, "connected", double)
    monkeypatch.setattr(on_ray, "connected", double)
    text = FLEET.replace('kind = "peft"', 'kind = "peft"\nresources = { sm87 = 1 }')
    file = world / "orin.toml"
    file.write_text(text)
    words = "t0/lora, t1/lora, t2/lora need 1 of 'sm87', and the nearest machine"
    given = [str(file), "-o", str(tmp_path / "out"), "--on", "ray", "--address", "auto"]
    for command in (["plan", *given], ["run", *given], ["run", *given, "--dry-run"]):
        done = CliRunner().invoke(main, ["fleet", *command])
        assert done.exit_code == 9, done.output
        assert words in " ".join(done.output.split())
    assert not list(tmp_path.rglob("task.json"))
    told = CliRunner().invoke(main, ["fleet", "plan", *given, "--json"])
    report = json.loads(told.stdout)
    assert told.exit_code == 9
    assert (report["machines"], report["lacks"][0]["resource"]) == (1, "sm87")
    file.write_text(FLEET)
    assert CliRunner().invoke(main, ["fleet", "plan", *given]).exit_code == 0
    local_only = ["fleet", "plan", str(file), "--address", "auto"]
    assert CliRunner().invoke(main, local_only).exit_code == 2


def test_a_worker_of_another_version_fails_its_task_alone(tmp_path: Path) -> None:
    given = {"task": {"id": "0", "name": "t/m"}, "out": str(tmp_path)}
    answer = _started(given, 1, "0.0.1")
    assert (answer["status"], answer["exit_code"]) == ("failed", 9)
    assert (
        answer["error"] == f"this machine has kilodelta {kilodelta.__version__}, the driver 0.0.1"
    )


def test_a_fleet_is_reported_by_its_folder(world: Path, finished: Path, tmp_path: Path) -> None:
    """`fleet report out/ --html` and `fleet status` say the same, by folder or by file."""
    import shutil

    from click.testing import CliRunner

    from kilodelta.cli import main
    from kilodelta.fleet.status import remember

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    lost = CliRunner().invoke(main, ["fleet", "report", str(out), "--html"])
    assert lost.exit_code == 9, lost.output
    assert "does not say which fleet it is of" in lost.output
    remember(out, world / "fleet.toml")
    done = CliRunner().invoke(main, ["fleet", "report", str(out), "--html"])
    assert done.exit_code == 0, done.output
    page = (out / "fleet.html").read_text()
    assert all(f"t{number}" in page for number in range(COUNT))
    assert 'href="./fine-tunes/t0/merged/task.json"' in page
    elsewhere = tmp_path / "pages" / "page.html"
    elsewhere.parent.mkdir()
    CliRunner().invoke(main, ["fleet", "report", str(out), "--html", str(elsewhere)])
    assert 'href="../out/fine-tunes/t0/merged/task.json"' in elsewhere.read_text()
    told = CliRunner().invoke(main, ["fleet", "status", str(out), "--json"])
    given = ["fleet", "status", str(world / "fleet.toml"), "-o", str(out), "--json"]
    assert told.stdout == CliRunner().invoke(main, given).stdout
    assert json.loads(told.stdout)["counts"]["done"] == 3 * COUNT + 1


def test_a_fault_of_ours_is_one_tasks_answer(tmp_path: Path) -> None:
    task = {"id": "0", "name": "x", "place": "x", "kind": "merge", "key": {}, "params": {}}
    answer = child.do(task, tmp_path)
    assert answer["status"] == "failed"
    assert answer["error"].startswith("KeyError")
    assert "traceback" in answer
    assert not (tmp_path / "x").exists()


def made_at(out: Path) -> dict[str, tuple[int, int]]:
    """Of every result that is there: which file its record is, and when it was written."""
    records = {str(path.relative_to(out)): path.stat() for path in out.rglob(RECORD)}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in records.items()}


@pytest.mark.slow
def test_ray_with_a_killed_worker_gives_the_same_bytes(
    world: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers; one is killed from outside while its child works.

    Ray tries it again by itself; where it may not, the task is lost, and a rerun makes that task
    and those that need it, and nothing else.
    """
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        done = _run_and_kill(world, tmp_path / "retried")
        assert done.failed == (), done.failed
        assert digests(tmp_path / "retried") == digests(finished)

        monkeypatch.setattr(on_ray, "RETRIES", 0)
        out = tmp_path / "lost"
        done = _run_and_kill(world, out)
        [lost] = done.failed
        before = made_at(out)
        assert len(before) == 3 * COUNT + 1 - 1 - len(done.skipped)
        again = on_ray.run_on_ray(plan_of(world, out))
        assert {a["name"] for a in again.answers.values()} == {lost["name"], *done.skipped}
        assert all(a["again"] for a in again.answers.values())
        assert again.done_before == len(before)
        assert made_at(out).items() >= before.items()
        assert digests(out) == digests(finished)

        third = on_ray.run_on_ray(plan_of(world, out))
        assert (third.answers, third.done_before) == ({}, 3 * COUNT + 1)
        lacking = dataclasses.replace(plan_of(world, out).tasks[0], resources={"sm87": 1})
        with pytest.raises(InputError, match="needs 1 of 'sm87', and the nearest"):
            require_resources([lacking], machines_of(ray))
    finally:
        ray.shutdown()


def _run_and_kill(world: Path, out: Path) -> Any:
    killed = threading.Event()
    threading.Thread(target=_kill_one_worker, args=(killed,), daemon=True).start()
    done = on_ray.run_on_ray(plan_of(world, out))
    assert killed.wait(60)
    return done


def _kill_one_worker(killed: threading.Event) -> None:
    """Kill the first Ray worker that has a child of ours."""
    for _ in range(600):
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes()
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                above = Path("/proc", str(parent), "cmdline").read_bytes()
            except (OSError, ValueError, IndexError):
                continue
            # the driver has children of ours as well: this process
            if b"kilodelta.fleet.child" in line and above.startswith(b"ray::"):
                os.kill(parent, signal.SIGKILL)
                killed.set()
                return
        time.sleep(0.1)
