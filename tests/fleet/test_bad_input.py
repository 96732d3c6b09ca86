"""What can go wrong around a fleet: a sentence and a fix each, and no other task suffers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tomllib")
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from kilodelta.cli import main
from kilodelta.errors import InputError, OutputError, require
from kilodelta.fleet import child, make_plan, read_fleet, run, work
from kilodelta.fleet.status import PLANNED, remember
from kilodelta.format.file import load
from kilodelta.format.methods import Lora
from tests.support import grids, making, processes

GOLDEN = Path(__file__).parents[1] / "golden" / "0.1.0"
FLEET = """
version = 1
[base.mini]
path = "base.safetensors"
[[fine-tunes]]
deltas = ["*.kd"]
[target.merged]
kind = "merge"
[target.lora]
kind = "gguf"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base, two fine-tunes of it, and the file that names them."""
    for name in ("base.safetensors", "nola-8.kd", "nola-16.kd"):
        shutil.copy(GOLDEN / name, tmp_path / name)
    (tmp_path / "fleet.toml").write_text(FLEET)
    return tmp_path


def plan_of(folder: Path) -> Any:
    return make_plan(read_fleet(folder / "fleet.toml"), folder / "out")


def answers(plan: Any, kind: str) -> dict[str, Any]:
    """Do the tasks of a kind in this process, and return their answers by fine-tune."""
    tasks = [task for task in plan.tasks if task.kind == kind]
    return {task.fine_tune: child.do(task.to_json(), plan.out) for task in tasks}


def refused(*given: str) -> str:
    done = CliRunner().invoke(main, ["fleet", *given])
    assert done.exit_code in (2, InputError.exit_code, OutputError.exit_code), done.output
    return done.output


@pytest.mark.parametrize("change", [Path.unlink, lambda p: shutil.copy(GOLDEN / "lora-8.kd", p)])
def test_a_fine_tune_that_goes_after_the_plan_costs_its_own_tasks(
    folder: Path, change: Any
) -> None:
    """Another file under its name would else be recorded as the result of the planned one."""
    plan = plan_of(folder)
    change(folder / "nola-8.kd")
    done = answers(plan, "merge")
    assert done["nola-16"]["status"] == "done"
    lost = done["nola-8"]
    assert (lost["status"], lost["exit_code"]) == ("failed", InputError.exit_code)
    assert "nola-8.kd" in lost["error"]
    assert lost["fix"]
    assert not (folder / "out" / "fine-tunes" / "nola-8" / "merged").exists()


def test_a_base_that_goes_after_the_plan_fails_with_a_sentence(folder: Path) -> None:
    plan = plan_of(folder)
    (folder / "base.safetensors").unlink()
    for answer in answers(plan, "merge").values():
        assert answer["status"] == "failed"
        assert "base.safetensors" in answer["error"]
        assert "traceback" not in answer


def test_a_plan_names_files_that_will_fail(folder: Path) -> None:
    """A `.kd` file of another base, a damaged one and no such file; the others are made."""
    other = folder / "other" / "base.safetensors"
    other.parent.mkdir()
    tensors = load_file(folder / "base.safetensors")
    first = min(tensors)
    save_file({**tensors, first: tensors[first] + 1}, other)
    delta = load(folder / "nola-8.kd")
    tune = making.delta(other, Lora(rank=1), patterns=delta.manifest.patterns)
    tune.save(folder / "stray.kd")
    whole = (folder / "nola-16.kd").read_bytes()
    (folder / "bent.kd").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (folder / "text.kd").write_text("nothing of the kind")
    plan = plan_of(folder)
    root, stray = delta.manifest.base.root, tune.manifest.base.root
    assert plan.faults.keys() == {"bent", "stray", "text"}
    assert f"{folder / 'stray.kd'} is made for the base {stray} (" in plan.faults["stray"]
    assert plan.faults["stray"].endswith(f"and mini is {root}")
    assert "bent.kd" in plan.faults["bent"]
    assert "it is a text file" in plan.faults["text"]
    assert plan.to_json()["faults"] == plan.faults
    shown = CliRunner().invoke(
        main, ["fleet", "plan", str(folder / "fleet.toml"), "-o", str(folder / "out")]
    )
    assert shown.exit_code == 0
    assert "warning: all tasks of stray will fail: " in shown.stderr
    done = answers(plan, "merge")
    failed = {name for name, answer in done.items() if answer["status"] == "failed"}
    assert failed == plan.faults.keys()
    assert done["stray"]["exit_code"] == 5


def test_a_missing_package_is_those_tasks_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gguf(params: Any, out: Path) -> Any:
        return require("no_such_package", extra="gguf", why="write GGUF files")

    monkeypatch.setattr(child, "WORK", {**work.WORK, "gguf": gguf})
    plan = plan_of(folder)
    for answer in answers(plan, "gguf").values():
        assert (
            answer["error"] == "no_such_package is not installed; it is needed to write GGUF files"
        )
        assert "'.[gguf]'" in answer["fix"]
    assert {a["status"] for a in answers(plan, "merge").values()} == {"done"}


WITHOUT_TORCH = """
from pathlib import Path
from kilodelta.errors import MissingPackageError
from kilodelta.fleet import work
params = {
    "base": "base.safetensors", "dtype": "fp32", "model": None, "inputs": None, "options": {},
    "tuned": "tuned.safetensors", "labels": None, "name": "one", "delta": "nola-8.kd",
}
for kind in ("onnx-base", "compress", "onnx"):
    try:
        work.WORK[kind](params, Path())
    except MissingPackageError as error:
        print(error.what, error.fix)
"""


def test_work_that_needs_torch_says_what_to_install() -> None:
    lines = processes.run(processes.BLOCKED + WITHOUT_TORCH).splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith("torch is not installed; it is needed to"), line
        assert "pip install" in line


def test_results_of_another_fleet_are_not_mixed_in(folder: Path) -> None:
    """Results of one name would replace each other."""
    out, other = folder / "out", folder / "other.toml"
    shutil.copy(folder / "fleet.toml", other)
    remember(out, folder / "fleet.toml")
    remember(out, folder / "fleet.toml")
    said = refused("run", str(other), "-o", str(out))
    assert "holds results of" in said
    assert PLANNED in said
    assert not (out / "fine-tunes").exists()
    (folder / "fleet.toml").rename(folder / "moved.toml")  # the file that wrote it may move
    remember(out, folder / "moved.toml")
    assert json.loads((out / PLANNED).read_text())["file"] == str(folder / "moved.toml")


def test_results_need_a_folder(folder: Path) -> None:
    (folder / "out").write_text("a file")
    said = refused("run", str(folder / "fleet.toml"), "-o", str(folder / "out"))
    assert "cannot be written" in said
    with pytest.raises(OutputError, match="cannot be written"):
        run(plan_of(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "bundle.json"])
def test_results_do_not_go_into_a_model(folder: Path, name: str) -> None:
    """The folder of a base, given by mistake, would hold them beside its weights."""
    (folder / "other").mkdir()
    (folder / "other" / name).touch()
    said = refused("run", str(folder / "fleet.toml"), "-o", str(folder / "other"))
    assert f"holds {name}: it is the folder of a model or of a device" in said
    assert [place.name for place in (folder / "other").iterdir()] == [name]


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("9/8", "there is no shard 9 of 8"),
        ("0/8", "there is no shard 0 of 8"),
        ("1/0", "there is no shard 1 of 0"),
        ("3", "write 3/8"),
        ("3/", "write 3/8"),
        ("/3", "write 3/8"),
        ("-1/8", "write 3/8"),
        ("1/²", "write 3/8"),
        (f"1/{'9' * 5000}", "write 3/8"),
    ],
)
def test_a_shard_that_does_not_exist(folder: Path, shard: str, words: str) -> None:
    said = refused("run", str(folder / "fleet.toml"), "-o", str(folder / "out"), "--shard", shard)
    assert words in said


def test_a_status_of_a_folder_whose_file_has_gone(folder: Path) -> None:
    remember(folder / "out", folder / "fleet.toml")
    (folder / "fleet.toml").unlink()
    assert "cannot be read" in refused("status", str(folder / "out"))
    (folder / "empty").mkdir()
    assert f"does not say which fleet it is of: it has no {PLANNED}" in refused(
        "status", str(folder / "empty")
    )


def test_engines_of_a_quantised_base_are_patched_and_not_refitted(folder: Path) -> None:
    """It is said by `plan`, before anything is exported."""
    grids.folder(folder / "int4", grids.CT, {"a.weight": np.zeros((2, 2), np.float32)})
    text = (
        FLEET.replace("base.safetensors", "int4")
        + """
[target.pc]
kind = "release"
version = 1
probe = false
bundle = { mode = "refit", engine = ["sm86"] }
"""
    )
    (folder / "fleet.toml").write_text(text)
    said = refused("plan", str(folder / "fleet.toml"), "-o", str(folder / "out"))
    assert "target pc refits an engine, and base mini is a quantised model" in said
    for bundle in ('"patch", engine = ["sm86"]', '"patch"', '"adapter", engine = ["sm86"]'):
        (folder / "fleet.toml").write_text(text.replace('"refit", engine = ["sm86"]', bundle))
        assert "bundle" in {task.kind for task in plan_of(folder).tasks}


def test_fine_tunes_of_a_quantised_base_share_no_graph(folder: Path) -> None:
    """Each graph holds other codes, so that each is an export."""
    grids.folder(folder / "int4", grids.CT, {"a.weight": np.zeros((2, 2), np.float32)})
    targets = '[target.rtx]\nkind = "tensorrt"\nfor = ["sm89"]\n[target.onnx]\nkind = "onnx"\n'
    head = FLEET.partition("[target.")[0].replace("base.safetensors", "int4")
    (folder / "fleet.toml").write_text(head + targets)
    tasks = plan_of(folder).tasks
    assert [task.kind for task in tasks] == ["tensorrt", "onnx"] * 2
    assert not any(task.needs or "template" in task.params for task in tasks)
