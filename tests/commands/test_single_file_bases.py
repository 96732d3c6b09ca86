"""A quantised graph or GGUF file given as BASE: commands work with it, or say what to give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")

from click.testing import CliRunner, Result

from kilodelta.cli import main
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.merging import build
from tests.support import grids

CHECKPOINT = "give the checkpoint"


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A graph `base.onnx` of one weight, a file for it, folders `tuned` and `adapter`, inputs."""
    graph = grids.matmul_graph(tmp_path / "base.onnx", {"w.weight": grids.Numbers(16, 32, 32)})
    rng, lora = np.random.default_rng(1), Lora(rank=2)
    own = {"A": rng.normal(size=(2, 32)) * 0.2, "B": rng.normal(size=(16, 2)) * 0.2}
    numbers = {"w.weight": build.quantise_target(lora, own, 8)}
    recipe = build.Recipe(method=lora, patterns=Patterns(include=("w.weight",), exclude=()), bits=8)
    build.build(graph, recipe, numbers).save(tmp_path / "f.kd")
    grids.folder(tmp_path / "tuned", None, {"w.weight": np.zeros((16, 32), np.float32)})
    (tmp_path / "texts.txt").write_text("rain\n" * 8)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    (tmp_path / "base.gguf").write_bytes(b"GGUF" + b"\0" * 32)
    return tmp_path


def test_what_takes_a_graph_as_base(here: Path) -> None:
    base, file = here / "base.onnx", here / "f.kd"
    for words in (
        ("digest", base),
        ("merge", base, file, "-o", here / "merged.onnx"),
        ("verify", base, file, here / "merged.onnx"),
        ("rebase", base, file, "-o", here / "rebased.kd"),
        ("release", base, file, "-o", here / "released.kd", "--version", 1),
    ):
        done = call(*words)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize("suffix", [".onnx", ".gguf"])
@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (
            ("compress", "BASE", "tuned", "-o", "OUT", "--inputs", "texts.txt"),
            CHECKPOINT,
        ),
        (("plan", "BASE", "tuned", "--inputs", "texts.txt"), CHECKPOINT),
        (("export", "BASE", "f.kd", "-o", "OUT"), "kilodelta merge"),
        (("export-adapter", "BASE", "f.kd", "-o", "OUT"), CHECKPOINT),
        (("export-peft", "BASE", "f.kd", "-o", "OUT"), CHECKPOINT),
        (("export-gguf", "BASE", "f.kd", "-o", "OUT"), CHECKPOINT),
        (("export-edge-llm", "BASE", "f.kd", "-o", "OUT"), CHECKPOINT),
        (("import", "adapter", "--base", "BASE", "-o", "OUT"), CHECKPOINT),
        (("bundle", "BASE", "-o", "OUT", "--mode", "patch"), "kilodelta merge"),
        (("bundle", "BASE", "-o", "OUT", "--mode", "adapter"), "kilodelta merge"),
        (
            ("release", "BASE", "f.kd", "-o", "OUT", "--version", "1", "--inputs", "texts.txt"),
            "as a Hugging Face folder",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_needs_a_folder_says_so(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    words: tuple[str, ...],
    fix: str,
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(here)
    names = {"BASE": f"base{suffix}", "OUT": "out.kd"}
    done = call(*(names.get(word, word) for word in words))
    assert done.exit_code not in (0, 1), done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    assert f"base{suffix}" in done.output
    if suffix == ".onnx":  # the other is damaged besides, which some say first
        assert fix in done.output
    assert not (here / "out.kd").exists()


def test_a_graph_with_two_copies_of_a_weight_is_not_merged_by_halves(here: Path) -> None:
    import onnx

    model = onnx.load(here / "base.onnx")
    (node,) = model.graph.node
    second = onnx.NodeProto.FromString(node.SerializeToString())
    second.input[1], second.output[0] = "w.weight_quantized", "again"
    codes = next(t for t in model.graph.initializer if t.name == node.input[1])
    copy = onnx.TensorProto.FromString(codes.SerializeToString())
    copy.name = "w.weight_quantized"
    model.graph.initializer.append(copy)
    model.graph.node.append(second)
    onnx.save(model, here / "two.onnx")
    done = call("merge", here / "two.onnx", here / "f.kd", "-o", here / "merged.onnx")
    assert done.exit_code == 9, done.output
    assert "holds w.weight in 2 copies" in done.output
    assert not (here / "merged.onnx").exists()
