"""One logical root for all layouts of the same numbers, and another for any other number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import kilodelta
from kilodelta.cli import main
from kilodelta.grid import LogicalIdentity, QuantisedModel, open_quantised
from tests.support import grids
from tests.support.grids import Numbers

SYMMETRIC = Numbers(16, 64, 32)
SHIFTED = Numbers(16, 64, 32, zeros=True, seed=2)


def opened(place: Path, config: Any, tensors: dict[str, Any]) -> QuantisedModel:
    return open_quantised(grids.folder(place, config, tensors))


def identity(place: Path, config: Any, tensors: dict[str, Any]) -> LogicalIdentity:
    return opened(place, config, tensors).identity(threads=1)


@pytest.mark.parametrize(("n", "zeros"), [(SYMMETRIC, False), (SHIFTED, True)])
def test_three_spellings_have_one_logical_root(tmp_path: Path, n: Numbers, zeros: bool) -> None:
    pytest.importorskip("onnx")
    packed = grids.pack_quantized("a", n, zeros=zeros)
    wide = grids.pack_quantized("a", n, zeros=zeros, dtype="float32")  # of the same scales
    config = grids.ct_config(symmetric=not zeros)
    v2 = {**grids.GPTQ, "checkpoint_format": "gptq_v2"}
    graph = grids.matmul_graph(tmp_path / "m.onnx", {"a.weight": n}, zeros=zeros)
    found = {
        "pack-quantized": identity(tmp_path / "p", config, packed),
        "in float32": identity(tmp_path / "w", config, wide),
        "gptq": identity(tmp_path / "g", grids.GPTQ, grids.gptq("a", n)),
        "gptq_v2": identity(tmp_path / "h", v2, grids.gptq("a", n, v1=False)),
        "awq": identity(tmp_path / "a", grids.AWQ, grids.awq("a", n)),
        "MatMulNBits": open_quantised(graph).identity(),
    }
    assert len({one.root for one in found.values()}) == 1, found
    assert len({one.config for one in found.values()}) > 3  # the configuration's digest tells
    assert {one.still_blocks for one in found.values()} == {1}


def test_padding_behind_k_does_not_count(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    n = Numbers(8, 40, 16)
    roots = {
        open_quantised(grids.matmul_graph(tmp_path / f"{p}.onnx", {"a": n}, padding=p))
        .identity()
        .root
        for p in (0, 5, 15)
    }
    assert len(roots) == 1


@pytest.mark.parametrize("what", ["code", "scale", "zero", "group", "name", "order"])
def test_any_other_number_is_another_root(tmp_path: Path, what: str) -> None:
    config = grids.ct_config(symmetric=False)
    first = identity(tmp_path / "a", config, grids.pack_quantized("a", SHIFTED, zeros=True)).root
    n = Numbers(16, 64, 32, zeros=True, seed=2)
    name = "b" if what == "name" else "a"
    if what == "code":
        n.codes[15, 63] ^= 1
    elif what == "scale":
        n.scales[15, 1] = np.nextafter(n.scales[15, 1], np.float16(9))
    elif what == "zero":
        n.zeros[15, 1] ^= 1
    elif what == "group":
        n.group, n.scales, n.zeros = 16, n.scales.repeat(2, 1), n.zeros.repeat(2, 1)
        config = grids.ct_config(symmetric=False, group_size=16)
    tensors = grids.pack_quantized(name, n, zeros=True)
    if what == "order":
        tensors["a.weight_g_idx"] = (1 - np.arange(64) // 32).astype(np.int32)
    assert identity(tmp_path / "b", config, tensors).root != first


def nvfp4(whole: float) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    return {
        "codes": rng.integers(0, 256, (8, 16), np.uint8),
        "scale": rng.integers(0, 0x7F, (8, 2), np.uint8).view(ml_dtypes.float8_e4m3fn),
        "whole": np.array([whole], np.float32),
    }


@pytest.mark.parametrize(("divisor", "one"), [(4096.0, True), (13297.0, False)])
def test_nvfp4_spellings_are_one_where_the_scales_multiply_to_one(
    tmp_path: Path, divisor: float, one: bool
) -> None:
    n = nvfp4(divisor)
    packed = {
        "a.weight_packed": n["codes"],
        "a.weight_scale": n["scale"],
        "a.weight_global_scale": n["whole"],
    }
    modelopt = {
        "a.weight": n["codes"],
        "a.weight_scale": n["scale"],
        "a.weight_scale_2": np.float32(1) / n["whole"],
    }
    first = identity(tmp_path / "c", grids.NVFP4, packed)
    second = identity(tmp_path / "m", grids.MODELOPT, modelopt)
    assert (first.root == second.root) is one


def test_minus_zero_hashes_as_zero(tmp_path: Path) -> None:
    n = nvfp4(64.0)
    tensors = {
        "a.weight_packed": n["codes"],
        "a.weight_scale": n["scale"],
        "a.weight_global_scale": n["whole"],
    }
    n["codes"][0, 0] = 0x00
    first = identity(tmp_path / "a", grids.NVFP4, tensors).root
    n["codes"][0, 0] = 0x88  # two codes of -0
    assert identity(tmp_path / "b", grids.NVFP4, tensors).root == first
    n["codes"][0, 0] = 0x08  # the first alone
    assert identity(tmp_path / "c", grids.NVFP4, tensors).root == first
    n["codes"][0, 0] = 0x01
    assert identity(tmp_path / "d", grids.NVFP4, tensors).root != first


def test_other_tensors_count_by_value_in_a_root_of_their_own(tmp_path: Path) -> None:
    packed = grids.pack_quantized("a", SYMMETRIC)
    norm = np.array([1, 0.5, -0.0])
    found = [
        identity(tmp_path / str(k), grids.CT, {**packed, "norm.weight": value})
        for k, value in enumerate(
            (
                norm.astype(np.float32),
                norm.astype(np.float16),
                np.abs(norm).astype(ml_dtypes.bfloat16),
                norm.astype(np.float64),
                (norm + 1).astype(np.float32),
            )
        )
    ]
    assert len({one.root for one in found}) == 1
    assert len({one.plain for one in found[:3]}) == 1
    assert len({one.plain for one in found}) == 3


def test_a_digest_that_was_typed_in(tmp_path: Path) -> None:
    """The root of a small weight is a constant of the format (docs/format.md, section 10)."""
    import hashlib
    import struct

    n = Numbers(2, 4, 2)
    n.codes = np.array([[0, 15, 8, 7], [1, 2, 3, 4]])
    n.scales = np.array([[0.5, -0.0], [-2, 1]], np.float16)
    config = grids.ct_config(group_size=2)
    found = identity(tmp_path / "m", config, grids.pack_quantized("w", n))
    head = b"kilodelta grid 1\0w.weight\0int4\x002,4\x001,2\x00000\0"
    steps = struct.pack("<4d", 0.5, 0.0, -2.0, 1.0)
    codes = struct.pack("<8b", -8, 7, 0, -1, -7, -6, -5, -4)
    assert found.weights["w.weight"] == "sha256:" + hashlib.sha256(head + steps + codes).hexdigest()


def test_the_command_prints_both_roots(tmp_path: Path) -> None:
    place = grids.folder(tmp_path / "m", grids.CT, grids.pack_quantized("a", SYMMETRIC))
    found = open_quantised(place).identity()
    stored = kilodelta.digest(place)
    shown = CliRunner().invoke(main, ["digest", str(place)])
    assert shown.exit_code == 0, shown.output
    assert f"{stored.root}  {place}" in shown.stdout
    assert f"{found.root}  (logical root of 1 weights, compressed-tensors)" in shown.stdout
    assert "1 blocks have a step of zero" in shown.output
    table = json.loads(CliRunner().invoke(main, ["digest", str(place), "--json"]).stdout)
    assert table["root"] == stored.root
    assert table["quantised"]["logical_root"] == found.root
    assert table["quantised"]["configuration"] == found.config
    listed = CliRunner().invoke(main, ["digest", str(place), "--tensors"]).stdout
    assert f"{found.weights['a.weight']}  a.weight (logical)" in listed


def test_the_room_loads_no_numba_before_it_decodes() -> None:
    code = "import sys, kilodelta.format.file, kilodelta.grid; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
