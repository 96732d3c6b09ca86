"""Merges, exports and bundles ask a disk for room before they read the base."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest

from kilodelta.errors import OutputError
from kilodelta.export.merge import checkpoint as merging
from kilodelta.export.merge.checkpoint import merge
from kilodelta.export.merge.room import merged_need
from kilodelta.export.room import graph_need, needs_of_bundle, needs_of_export
from kilodelta.files.checkpoint import SINGLE, Checkpoint
from kilodelta.format.file import load
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid import open_quantised
from kilodelta.grid.dequantise import float_bytes, float_folder
from tests.support import grids, making, pico
from tests.support.disks import with_free
from tests.support.grids import Numbers
from tests.support.processes import GOLDEN

BASE, FILE = GOLDEN / "base.safetensors", GOLDEN / "nola-8.kd"


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("the work began")


def grid_base(place: Path) -> Path:
    tensors = grids.pack_quantized("w", Numbers(48, 64, 32))
    return grids.folder(place, grids.ct_config(), tensors)


def test_a_merge_takes_what_was_counted(tmp_path: Path) -> None:
    delta = load(FILE)
    need = merged_need(tmp_path / "m.safetensors", Checkpoint.open(BASE), delta)
    done = merge(BASE, FILE, need.path)
    assert done.nbytes == need.nbytes == need.path.stat().st_size


def test_a_merge_asks_before_it_reads_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "require_base", never)
    with_free(monkeypatch, BASE.stat().st_size - 1)
    with pytest.raises(OutputError, match=f"are needed for the merged weights, and {tmp_path} has"):
        merge(BASE, FILE, tmp_path / "m.safetensors")
    with pytest.raises(OutputError, match="the merged weights"):
        merge(BASE, FILE, tmp_path / "folder")
    assert not any(tmp_path.iterdir())
    with_free(monkeypatch, BASE.stat().st_size)
    with pytest.raises(AssertionError, match="began"):
        merge(BASE, FILE, tmp_path / "m.safetensors")


def test_the_values_of_codes_take_what_was_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_quantised(grid_base(tmp_path / "base"))
    for dtype in ("float32", "float64"):
        with float_folder(model, beside=tmp_path / "x", dtype=dtype) as place:
            size = (place / SINGLE).stat().st_size
        assert 0 <= size - float_bytes(model, dtype) < 500  # the header
    with_free(monkeypatch, 48 * 64 * 4 - 1)
    with (
        pytest.raises(OutputError, match="values of the quantised base as floats"),
        float_folder(model, beside=tmp_path / "x"),
    ):
        never()
    with pytest.raises(OutputError) as caught, float_folder(model):
        never()
    assert "set TMPDIR" in caught.value.fix


def test_a_file_of_codes_is_counted_whole(tmp_path: Path) -> None:
    graph = grids.matmul_graph(tmp_path / "m.onnx", {"w": Numbers(48, 64, 32)})
    model = open_quantised(graph)
    need = merged_need(tmp_path / "out.onnx", model, load(FILE))
    assert need.nbytes == graph.stat().st_size


def test_what_an_export_and_a_bundle_take(tmp_path: Path) -> None:
    base = Checkpoint.open(BASE)
    numbers = sum(prod(base.info(name).shape) for name in base.names)
    halves = graph_need(base, tmp_path / "out", "float16")
    assert (halves.nbytes, halves.what) == (2 * numbers, "the fp16 graph")
    merged, whole, half = needs_of_export(
        base, load(FILE), tmp_path / "out", ("float32", "float16")
    )
    assert merged.nbytes == BASE.stat().st_size
    assert (whole.nbytes, half.nbytes) == (4 * numbers, 2 * numbers)
    assert [n.nbytes for n in needs_of_bundle(base, tmp_path / "out", "float16")] == [2 * numbers]
    model = open_quantised(grid_base(tmp_path / "base"))
    stored = sum(model.source.info(place).nbytes for place in model.of("w.weight").parts.values())
    values, graph = needs_of_bundle(model, tmp_path / "out", "float32")
    assert (values.nbytes, graph.nbytes) == (48 * 64 * 4, stored)


def test_an_export_and_a_bundle_ask_before_their_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("transformers")
    from kilodelta.device import bundle
    from kilodelta.device.make import bundling
    from kilodelta.export import pipeline
    from kilodelta.export.pipeline import export

    base = pico.bert(tmp_path / "base")
    file = tmp_path / "task.kd"
    patterns = Patterns(include=("encoder.*.weight",), exclude=("*Norm*",))
    making.delta(base, Lora(rank=1), patterns=patterns).save(file)
    monkeypatch.setattr(pipeline, "merged_weights", never)
    monkeypatch.setattr(bundling, "open_headed", never)
    with_free(monkeypatch, 10_000)
    with pytest.raises(OutputError, match=r"the merged weights \(.*\), the fp32 graph \(.*\), and"):
        export(base, file, tmp_path / "out", onnx=True)
    with pytest.raises(OutputError, match="for the fp16 graph, and"):
        bundle(base, tmp_path / "out", mode="patch", dtype="fp16")
    assert not (tmp_path / "out").exists()
    with_free(monkeypatch, 10**8)
    with pytest.raises(AssertionError, match="began"):
        export(base, file, tmp_path / "out", onnx=True)
    with pytest.raises(AssertionError, match="began"):
        bundle(base, tmp_path / "out", mode="patch", dtype="fp16")
