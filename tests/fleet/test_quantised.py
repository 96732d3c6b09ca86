"""A fleet of a quantised base, run for real: merges, graphs, and releases for both ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tomllib")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
from kilodelta.device import apply
from kilodelta.fleet import make_plan, read_fleet, run
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid import open_quantised
from kilodelta.grid.quantise import quantise_folder
from kilodelta.merging import build
from tests.support import pico

FLEET = """
version = 1
[base.mini]
path = "int4"
inputs = "texts.txt"
[[fine-tunes]]
deltas = ["ready/*.kd"]
[target.merged]
kind = "merge"
[target.onnx]
kind = "onnx"
[target.codes]
kind = "release"
version = 3
bundle = { mode = "patch" }
[target.beside]
kind = "release"
version = 3
bundle = { mode = "adapter" }
"""


@pytest.mark.slow
def test_a_fleet_of_a_quantised_base(tmp_path: Path) -> None:
    def is_square(name: str) -> bool:
        return name.endswith(".weight") and ".attention." in name and "LayerNorm" not in name

    quantise_folder(
        pico.bert(tmp_path / "floats", width=32, layers=1), tmp_path / "int4", "int4-g32", is_square
    )
    (tmp_path / "texts.txt").write_text("\n".join(pico.TEXTS))
    (tmp_path / "ready").mkdir()
    for seed in (1, 2):
        rng, lora = np.random.default_rng(seed), Lora(rank=2)
        own = {
            name: build.quantise_target(
                lora,
                {"A": rng.normal(size=(2, 32)) * 0.2, "B": rng.normal(size=(32, 2)) * 0.2},
                8,
            )
            for name in open_quantised(tmp_path / "int4").stored
        }
        recipe = build.Recipe(
            method=lora, patterns=Patterns(include=tuple(own), exclude=()), bits=8
        )
        build.build(tmp_path / "int4", recipe, own).save(tmp_path / "ready" / f"t{seed}.kd")
    (tmp_path / "fleet.toml").write_text(FLEET)
    out = tmp_path / "out"
    done = run(make_plan(read_fleet(tmp_path / "fleet.toml"), out), jobs=1)
    assert done.failed == ()
    assert len(done.answers) == 2 * 4 + 2
    for name in ("t1", "t2"):
        made = out / "fine-tunes" / name
        merged = open_quantised(made / "merged" / "merged").identity().weights
        (graph,) = (made / "onnx").rglob("*.onnx")
        held = open_quantised(graph).identity().weights
        assert {weight: merged[weight] for weight in held} == held
        for target in ("codes", "beside"):
            (release,) = (made / target).glob("*-3.kd")
            device = out / "bases" / "mini" / f"device-{target}" / "device"
            assert apply(device, release).seen.errors
