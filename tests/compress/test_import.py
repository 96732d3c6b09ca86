"""The front of the import: folders, names, refusals, the command, and the way to exact methods."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner

import kilodelta
from kilodelta.cli import main
from kilodelta.compress.adapters import import_adapter
from kilodelta.compress.adapters.conversion import convert_adapter
from kilodelta.compress.adapters.peft.config import AdapterConfig
from kilodelta.compress.adapters.peft.targeting import is_targeted
from kilodelta.errors import BaseMismatchError, CheckpointError, InputError
from kilodelta.expressions import Expressions
from tests.support import adapters, making, pico


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pico base and a RandLora adapter of it."""
    folder = tmp_path_factory.mktemp("case")
    base = pico.bert(folder / "base")
    options: dict[str, Any] = {"r": 5, "randlora_alpha": 20, "target_modules": ["query", "value"]}
    with adapters.quiet():
        model = adapters.wrap(base, "bert", peft.RandLoraConfig(**options))
    return base, adapters.save(model, folder / "adapter")


def changed(case: tuple[Path, Path], tmp_path: Path, **entries: Any) -> Path:
    """A copy of the adapter with other entries in its configuration."""
    folder = tmp_path / "changed"
    shutil.copytree(case[1], folder)
    table = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**table, **entries}))
    return folder


@pytest.mark.parametrize(
    ("entries", "error", "text"),
    [
        ({"peft_type": "BOFT"}, InputError, "peft_type 'BOFT' is not known here"),
        (
            {"peft_type": None},
            InputError,
            "has no peft_type: .* no adapter of Hugging Face",
        ),
        ({"r": "five"}, InputError, "r is 'five'"),
        ({"r": 0}, InputError, "r is 0"),
        ({"target_modules": ["query"]}, BaseMismatchError, "value .*its target_modules leave out"),
        (
            {"target_modules": ["query", "value", "key"]},
            BaseMismatchError,
            r"targets encoder.layer.0.attention.self.key, but holds nothing",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    case: tuple[Path, Path], tmp_path: Path, entries: Any, error: Any, text: str
) -> None:
    folder = changed(case, tmp_path, **entries)
    with pytest.raises(error, match=text):
        convert_adapter(folder, case[0], tmp_path / "task.kd")
    assert not (tmp_path / "task.kd").exists()


def test_a_wrong_base_is_named_by_its_tensor(case: tuple[Path, Path], tmp_path: Path) -> None:
    other = making.folder(tmp_path / "other", making.model())
    with pytest.raises(BaseMismatchError, match=r"has no tensor encoder.layer.0.*query.weight"):
        convert_adapter(case[1], other, tmp_path / "task.kd")


def test_a_damaged_file_is_refused(case: tuple[Path, Path], tmp_path: Path) -> None:
    folder = changed(case, tmp_path)
    place = folder / "adapter_model.safetensors"
    place.write_bytes(place.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="the tensors end at byte"):
        convert_adapter(folder, case[0], tmp_path / "task.kd")


def test_a_pickle_is_refused_with_a_reason(case: tuple[Path, Path], tmp_path: Path) -> None:
    folder = changed(case, tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="a pickle: reading it could run anything"):
        convert_adapter(folder, case[0], tmp_path / "task.kd")


def test_no_adapter_at_all_is_a_sentence(case: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config.json cannot be read: No such"):
        convert_adapter(tmp_path, case[0], tmp_path / "task.kd")


def test_an_encoders_adapter_finds_its_tensors_below_a_head(
    case: tuple[Path, Path], tmp_path: Path
) -> None:
    base = pico.bert_classifier(tmp_path / "headed")
    convert_adapter(case[1], base, tmp_path / "task.kd")
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    assert all(name.startswith("bert.encoder.layer.") for name in delta.targets)


@pytest.mark.parametrize(
    ("path", "targets", "expected"),
    [
        ("a.query", ["query"], True),
        ("a.myquery", ["query"], False),
        ("a.query", r".*\.query", True),
        ("a.query.b", r".*\.query", False),
    ],
)
def test_targets_are_matched_as_peft_does(path: str, targets: Any, expected: bool) -> None:
    config = AdapterConfig(
        where=Path("a"), values={"target_modules": targets}, expressions=Expressions("a")
    )
    assert is_targeted(path, config) is expected


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["import", *map(str, arguments)])


def test_the_command(case: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = case
    done = run(adapter, "--base", base, "-o", tmp_path / "task.kd")
    assert done.exit_code == 0, done.output
    assert "peft-randlora: rank 5" in done.output
    listed = run(adapter, "--base", base, "-o", tmp_path / "again.kd", "--json", "-q")
    assert json.loads(listed.stdout)["targets"] == 4
    assert (tmp_path / "again.kd").read_bytes() == (tmp_path / "task.kd").read_bytes()
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "task.kd")])
    assert "a compatibility form" in shown.output


def test_options_of_requantising_alone_are_refused(case: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(case[1], "--base", case[0], "-o", tmp_path / "task.kd", "--rank", 4)
    assert done.exit_code == InputError.exit_code
    assert "--rank belongs to --requantise" in done.output


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--alpha 8", "--alpha does nothing for .*: that is an option of official NOLA"),
        ("--drawn-on cpu", "--drawn-on does nothing for"),
        ("--factors x.safetensors --requantise", "--factors does nothing for"),
        ("--bits 4", "--bits does nothing for .*: its coefficients stay floats, of --dtype"),
        ("--requantise --steps 9", "--steps belongs to --inputs"),
        ("--requantise --model a:b", "--model belongs to --inputs"),
        ("--requantise --rank 999", "rank 999 is larger than both sides of encoder"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    case: tuple[Path, Path], tmp_path: Path, options: str, why: str
) -> None:
    done = run(case[1], "--base", case[0], "-o", tmp_path / "task.kd", *options.split())
    assert done.exit_code == InputError.exit_code
    assert re.search(why, " ".join(done.stderr.split()))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"basis_dtype": "float16"}])
def test_a_lora_has_no_floats_and_no_basis(tmp_path: Path, options: dict[str, Any]) -> None:
    base, folder, _ = adapted_by_lora(tmp_path)
    with pytest.raises(InputError, match=r"does nothing for .* peft_type LORA"):
        import_adapter(folder, base, tmp_path / "task.kd", **options)


def adapted_by_lora(place: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A pico base, a LoRA of it, and the updates that PEFT makes."""
    base = pico.bert(place / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
    model = adapters.wrap(base, "bert", config)
    updates = {
        name.removeprefix("base_model.model.") + ".weight": layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    updates = {name: update.detach() for name, update in updates.items()}
    return base, adapters.save(model, place / "adapter"), updates


def test_what_requantising_loses_is_told_of_the_adapter_itself(tmp_path: Path) -> None:
    """Not of a copy that `bits` had rounded before: 4 bits are spent once."""
    base, folder, updates = adapted_by_lora(tmp_path)
    done = import_adapter(
        folder, base, tmp_path / "task.kd", requantise=True, method="lora", rank=4, bits=4
    )
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    assert sorted(updates) == sorted(delta.targets)
    missed = sum(
        float((torch.from_numpy(delta.update(name)) - update.double()).square().sum())
        for name, update in updates.items()
    )
    whole = sum(float(update.double().square().sum()) for update in updates.values())
    # the copy has 16 bits: what it loses is a thousandth of what 4 bits do
    assert done.error == pytest.approx((missed / whole) ** 0.5, rel=0.01)


@pytest.mark.parametrize("rank", [4, 16])
def test_requantising_by_fit_measures_what_is_lost(
    case: tuple[Path, Path], tmp_path: Path, rank: int
) -> None:
    base, adapter = case
    options = ("--requantise", "--rank", rank, "--method", "lora", "--bits", 8, "--json", "-q")
    done = run(adapter, "--base", base, "-o", tmp_path / "task.kd", *options)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    # rank 16 is the full rank of these layers: nothing but int8 rounding is lost
    assert (report["weight_error"] < 0.02) is (rank == 16)
    assert 0 < report["weight_error"] < 1
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    assert kilodelta.inspect(tmp_path / "task.kd").exact
    assert len(delta.targets) == 4
    assert [place.name for place in tmp_path.iterdir()] == ["task.kd"]


def test_requantising_by_distillation(case: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = case
    (tmp_path / "texts.txt").write_text("\n".join(pico.TEXTS * 4))
    options = ("--method", "nola", "--rank", 2, "--bases", 16, "--steps", 4, "--json", "-q")
    done = run(
        adapter, "--base", base, "-o", tmp_path / "task.kd", "--requantise", *options,
        "--inputs", tmp_path / "texts.txt",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["method"]["name"] == "nola"
    assert kilodelta.inspect(tmp_path / "task.kd").exact
