"""`kilodelta compress` as it is typed: what it refuses at once, how it stops and goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import kilodelta
from kilodelta.cli import main
from kilodelta.commands.compress import modes
from kilodelta.compress import Options, Report, compress
from kilodelta.compress.distill.foreign import refuse_foreign
from kilodelta.compress.distill.learn.comparisons import Classes
from kilodelta.compress.distill.options import check, options_from
from kilodelta.errors import CheckpointError, InputError, OutputError
from kilodelta.format.methods import Lora, RandLora
from kilodelta.progress import Event
from tests.support import many_outputs
from tests.support.many_outputs import Spec

PLACE = "tests.support.many_outputs:"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with base, tuned model and inputs; the working directory."""
    monkeypatch.chdir(tmp_path)
    many_outputs.SPEC = Spec(inputs="tokens", mask=False, outputs=("logits",))
    return many_outputs.save_pair(tmp_path)


LEARN = ("--inputs", "ids.npz", "--model", PLACE + "make", "--method", "lora", "--steps", "20")
FIT = ("--method", "lora")


def typed(*arguments: str, models: tuple[str, str] = ("base.safetensors", "tuned.safetensors"),
          out: str = "task.kd") -> Result:  # fmt: skip
    return CliRunner().invoke(main, ["compress", *models, "-o", out, "-q", *arguments])


def test_nothing_is_overwritten_unasked_and_no_model_ever(here: Path) -> None:
    assert typed(*FIT).exit_code == 0
    first = (here / "task.kd").read_bytes()
    again = typed(*FIT, "--rank", "2")
    assert again.exit_code == OutputError.exit_code
    assert "task.kd exists already" in again.stderr
    assert (here / "task.kd").read_bytes() == first
    assert typed(*FIT, "--rank", "2", "--force").exit_code == 0
    assert (here / "task.kd").read_bytes() != first
    os.link("base.safetensors", "other-name")
    before = {
        name: (here / name).read_bytes() for name in ("base.safetensors", "tuned.safetensors")
    }
    for out in ("base.safetensors", "./tuned.safetensors", "other-name"):
        result = typed(*FIT, "--force", out=out)
        assert result.exit_code == OutputError.exit_code
        assert "is read and never written" in result.stderr
    assert before == {name: (here / name).read_bytes() for name in before}


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (".", ". is a folder"),
        ("absent/task.kd", "absent is no folder"),
        ("link", "link exists and is no plain file"),
        ("pipe", "pipe exists and is no plain file"),
    ],
)
def test_places_that_take_no_file(out: str, expected: str, here: Path) -> None:
    os.symlink("nowhere", "link")
    os.mkfifo("pipe")
    result = typed(*FIT, "--force", out=out)
    assert result.exit_code == OutputError.exit_code
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--budget", "0"), "a budget of 0 holds no file"),
        (("--budget", "0KB"), "a budget of 0KB holds no file"),
        (("--budget", "-3KB"), "'-3KB' is no size"),
        (("--budget", "9" * 300), "is no size"),
        (("--rank", "3"), "--rank and --bases belong to a method"),
        ((*FIT, "--bases", "3"), "lora has no bases"),
        (("--method", "randlora", "--bits", "16"), "randlora coefficients cannot have 16 bits"),
        ((*FIT, "--min-agreement", "0.5"), "agreement cannot be measured without inputs"),
        ((*FIT, "--labels", "x.txt"), "--labels cannot be compared with without inputs"),
        ((*FIT, "--outputs", "logits"), "--outputs cannot be matched without inputs"),
        ((*FIT, "--lr", "0.1"), "--lr trains nothing without inputs"),
        ((*FIT, "--teacher-cache", "x"), "--teacher-cache keeps nothing without inputs"),
        ((*FIT, "--held-out", "8"), "--held-out keeps nothing back without inputs"),
        ((*FIT, "--limit", "8"), "--limit and --max-length cut nothing without inputs"),
        ((*FIT, "--resume"), "only a run with inputs can be resumed"),
        (("--inputs", "ids.npz", "--resume"), ".kd.resume does not exist"),
        (("--classes", "logits=x"), "'logits=x' does not say which output"),
        (("--inputs", "ids.csv"), "ids.csv is no kind of input"),
        (("--inputs", "absent.npz"), "absent.npz is no file"),
        (("--inputs", "few.npz"), "few.npz holds 5 inputs; distillation needs at least 8"),
        (("--inputs", "ids.npz", "--held-out", "40"), "40 of 40 inputs cannot be held out"),
        (("--inputs", "ids.npz", "--batch", "296"), "40 inputs are too few for batches of 296"),
        (("--inputs", "ids.npz", "--labels", "no.txt"), "no.txt cannot be read"),
        (("--inputs", "ids.npz", "--labels", "one.txt"), "one.txt holds one label"),
    ],
)
def test_slips_are_answered_before_a_model_is_opened(
    arguments: tuple[str, ...], expected: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: Any, **more: Any) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("kilodelta.compress.distill.pair.open_model", never)
    np.savez("few.npz", input_ids=np.zeros((5, 6), int))
    Path("one.txt").write_text("rain\nrain\n")
    result = typed(*arguments)
    assert result.exit_code == InputError.exit_code, result.stderr
    assert expected in result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(budget=0), "budget is 0"),
        (Options(steps=1), "steps is 1"),
        (Options(rate=0.0), "rate is 0"),
        (Options(rate=float("nan")), "rate is nan"),
        (Options(rate=float("inf")), "rate is inf"),
        (Options(held_out=0), "held_out is 0"),
        (Options(seed=-1), "seed is -1"),
        (Options(min_agreement=2.0), "min_agreement is 2"),
        (Options(outputs={"logits": 0.0}), "output logits has the weight 0"),
        (Options(outputs={"logits": float("inf")}), "output logits has the weight inf"),
        (Options(method="dora"), "'dora' is no method"),
        (Options(bits=5), "coefficients cannot have 5 bits"),
        (Options(method=RandLora(), bits=16), "randlora coefficients cannot have 16 bits"),
    ],
)
def test_options_out_of_range(options: Options, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        check(options, learns=True)


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ("ids.npz/below", "ids.npz is no folder, so no teacher cache"),
        ("dangling", "dangling is no folder"),
        ("models", "models is the base, which is read and never written"),
    ],
)
def test_places_that_are_no_teacher_cache(cache: str, expected: str, here: Path) -> None:
    os.symlink("nowhere", "dangling")
    (here / "models").mkdir()
    os.link("base.safetensors", "models/model.safetensors")
    result = typed(*LEARN, "--teacher-cache", cache, models=("models", "tuned.safetensors"))
    assert result.exit_code == OutputError.exit_code
    assert expected in result.stderr
    assert not (here / "task.kd").exists()


def test_an_empty_teacher_cache_is_no_folder(here: Path) -> None:
    with pytest.raises(OutputError, match="--teacher-cache names no folder"):
        learn(options={"teacher_cache": ""})
    assert not (here / "task.kd").exists()


def test_options_as_they_are_typed() -> None:
    found = options_from(outputs=["logits", "a.*=2.5"], classes=["logits=-1"], budget="12KB")
    assert found.outputs == {"logits": 1.0, "a.*": 2.5}
    assert found.classes == {"logits": -1}
    assert found.budget == 12_000


FOREIGN: list[tuple[str, Callable[[Path], Any], str, str]] = [
    ("m.gguf", lambda p: p.write_bytes(b"GGUF"), "is a GGUF file", "converted from"),
    ("weights", lambda p: p.write_bytes(b"GGUF...."), "is a GGUF file", "converted from"),
    ("m.pth", lambda p: p.write_bytes(b"PK"), "is a PyTorch pickle", "save_pretrained"),
    ("m.onnx", lambda p: p.write_bytes(b"x"), "is an ONNX file", "exported"),
    ("m.npy", lambda p: p.write_bytes(b"\x93NUMPY"), "is a .npy file", "--inputs"),
    ("m.kd", lambda p: p.write_bytes(b"x"), "is a kilodelta file", "kilodelta merge BASE FILE"),
    ("bin", lambda p: _folder(p, "pytorch_model.bin"), "is a folder with pytorch_model", "save"),
    ("quant", lambda p: _folder(p, "q4.gguf"), "is a folder with q4.gguf, a G", "converted"),
    ("peft", lambda p: _folder(p, "adapter_config.json", "adapter_model.safetensors"),
     "is the folder of a PEFT adapter", "kilodelta import"),
    ("device", lambda p: _folder(p, "bundle.json"), "is a device folder", "kilodelta status"),
    ("onnx", lambda p: _folder(p, "manifest.json"), "is the folder of an export", "verify"),
]  # fmt: skip


def _folder(path: Path, *names: str) -> None:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")


@pytest.mark.parametrize(("name", "make", "expected", "fix"), FOREIGN, ids=[f[0] for f in FOREIGN])
def test_other_kinds_of_models_are_named(
    name: str, make: Callable[[Path], Any], expected: str, fix: str, here: Path
) -> None:
    make(here / name)
    result = typed(*FIT, models=("base.safetensors", name))
    assert result.exit_code == CheckpointError.exit_code
    assert f"TUNED {name} {expected}" in result.stderr
    assert fix in result.stderr
    if name == "m.gguf":
        return  # a GGUF file may be the base: tests/grid/test_gguf_names.py
    with pytest.raises(CheckpointError, match=f"BASE {name}"):
        refuse_foreign(Path(name), "BASE")


def test_a_header_that_begins_like_a_pickle_is_a_model(tmp_path: Path) -> None:
    """The length of a safetensors header of 640 bytes begins with 0x80 0x02, as pickles do."""
    path = tmp_path / "weights"
    header = b"{" + b" " * 638 + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    refuse_foreign(path, "BASE")


def test_a_base_that_is_an_adapter_gets_the_base_s_fix(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        refuse_foreign(tmp_path, "BASE")
    assert error.value.fix == "give the model that the adapter was trained on"


def stop_at(step: int) -> Callable[[Event], None]:
    def progress(event: Event) -> None:
        if event.stage == "distil" and event.done == step:
            signal.raise_signal(signal.SIGINT)

    return progress


def learn(**more: Any) -> Report:
    options = Options(method=Lora(rank=1), steps=20, batch=8, model=PLACE + "make",
                      **more.pop("options", {}))  # fmt: skip
    return compress("base.safetensors", "tuned.safetensors", "task.kd", inputs="ids.npz",
                    options=options, **more)  # fmt: skip


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("step", [2, 17])
def test_ctrl_c_keeps_the_state_and_resume_ends_at_the_same_file(step: int, here: Path) -> None:
    learn()
    whole = (here / "task.kd").read_bytes()
    (here / "task.kd").unlink()
    cut = learn(progress=stop_at(step))
    assert cut.interrupted
    assert any(f"interrupted after {step} steps: --resume" in text for text in cut.warnings)
    assert kilodelta.inspect("task.kd").made["interrupted"] is True
    assert (here / "task.kd.resume").exists()
    with pytest.raises(OutputError, match="exists already"):
        learn()
    (here / "task.kd").unlink()
    with pytest.raises(OutputError, match=r"task.kd.resume holds an interrupted run"):
        learn()
    done = learn(resume=True)
    assert not done.interrupted
    assert (here / "task.kd").read_bytes() == whole
    assert "interrupted" not in kilodelta.inspect("task.kd").made
    assert not (here / "task.kd.resume").exists()


@pytest.mark.usefixtures("ctrl_c")
def test_a_run_is_known_by_all_that_makes_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 of 64 held-out inputs had been trained on, where `--held-out` was not in the key."""
    learn(progress=stop_at(3))
    for options, named in [
        ({"held_out": 9}, "held-out inputs"),
        ({"limit": 30}, r"inputs \(--inputs, --limit"),
        ({"seed": 4}, "held-out inputs"),
        ({"rate": 0.5}, "--rate"),
        ({"classes": {"logits": -1}, "bits": 8}, "--bits"),
    ]:
        with pytest.raises(InputError, match=f"belongs to a run with other .*{named}"):
            learn(resume=True, options=options)
    with monkeypatch.context() as other_version:
        other_version.setattr(Classes, "temperature", 3.0)
        with pytest.raises(InputError, match=r"other .*loss"):
            learn(resume=True, options={"classes": {"logits": -1}})
    ids = np.random.default_rng(1).integers(0, 20, (40, 6))
    np.savez("ids.npz", input_ids=ids)
    with pytest.raises(InputError, match=r"other inputs \("):
        learn(resume=True)
    (here / "task.kd.resume").write_bytes(b"half")
    with pytest.raises(InputError, match=r"task.kd.resume is damaged"):
        learn(resume=True)
    learn(force=True)
    assert not (here / "task.kd.resume").exists()


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_command_exits_130(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kilodelta.compress.distill.learn import steps

    step = steps.Run.take

    def stopping(run: Any, chosen: Any) -> float:
        if run.step == 4:
            signal.raise_signal(signal.SIGINT)
        return step(run, chosen)

    monkeypatch.setattr(steps.Run, "take", stopping)
    result = typed(*LEARN, "--json")
    assert result.exit_code == 130
    assert json.loads(result.stdout)["interrupted"] is True
    assert "interrupted after 5 steps" in result.stderr
    shown = CliRunner().invoke(main, ["inspect", "task.kd"])
    assert "interrupted True" in shown.stdout
    monkeypatch.setattr(steps.Run, "take", step)
    done = typed(*LEARN, "--resume")
    assert done.exit_code == 0, done.stderr
    assert "mode" in done.stdout


def test_the_device_modes_that_accept_a_file(here: Path) -> None:
    assert typed(*FIT, "--rank", "3", "--json").exit_code == 0
    found = json.loads(typed(*FIT, "--rank", "3", "--json", "--force").stdout)
    assert found["modes"] == {
        "adapter": "yes, in a bundle of rank 3 or more",
        "patch": "yes",
        "refit": "yes",
    }
    whole = typed(*FIT, "--targets", "body*", "--extras", "classes.bias", "--json", "--force")
    assert json.loads(whole.stdout)["modes"]["adapter"] == "no: it stores classes.bias whole"
    learnt = typed(*LEARN[:4], "--method", "randlora", "--rank", "4", "--steps", "2", "--force",
                   "--json")  # fmt: skip
    assert json.loads(learnt.stdout)["modes"]["adapter"] == "no: the update has full rank"
    report = learn(force=True)
    assert modes(report)["patch"] == "yes"
    quantised = modes(dataclasses.replace(report, quantised=True))
    assert quantised == {**modes(report), "refit": "no: TensorRT refits no codes"}


def test_what_is_printed(here: Path) -> None:
    result = typed(*LEARN)
    assert result.exit_code == 0, result.stderr
    assert "top-1" in result.stdout
    assert "output" in result.stdout
    assert "logits: classes along axis 1 (5), top-1" in result.stdout
