"""Streaming through a device and merging in place: the same code on CPU tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kilodelta
from kilodelta.errors import (
    BaseMismatchError,
    CheckpointError,
    InputError,
    ProofError,
)
from kilodelta.export.merge import checkpoint as merge_module
from kilodelta.export.merge.in_place import merge_into
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora, Method, Nola
from kilodelta.merging import cpu
from kilodelta.merging.gpu import stream
from tests.support import making
from tests.support.loaded import Model

CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return making.write(tmp_path / "base.safetensors", making.model())


@pytest.mark.parametrize("method", making.METHODS, ids=making.ids)
@pytest.mark.parametrize("band", [1, 100, 1 << 20])
def test_bands_of_any_size_give_the_cpu_bytes(base: Path, method: Method, band: int) -> None:
    checkpoint = Checkpoint.open(base)
    delta = making.delta(base, method).bind(checkpoint)
    for target in delta.targets.values():
        data = checkpoint.data(target.name)
        wanted = b"".join(part.tobytes() for part in cpu.merged(delta, target, data))
        parts = stream.merged(delta, target, data, CPU, band)
        assert b"".join(part.tobytes() for part in parts) == wanted, target.name


def test_merge_streams_through_the_device(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = making.delta(base, Nola(rank=3, bases=130))
    kilodelta.merge(base, delta, tmp_path / "cpu.safetensors")
    seen = []

    def through(delta: Delta, target: Any, data: Any) -> Iterator[Any]:
        seen.append(target.name)
        return stream.merged(delta, target, data, CPU, 64)

    monkeypatch.setattr(merge_module, "merger", lambda device: (through, 2))
    kilodelta.merge(base, delta, tmp_path / "gpu.safetensors", device="cuda")
    assert sorted(seen) == sorted(delta.bind(base).targets)
    found, wanted = (tmp_path / f"{n}.safetensors" for n in ("gpu", "cpu"))
    assert found.read_bytes() == wanted.read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
@pytest.mark.parametrize(
    ("device", "text"),
    [("cuda", "sees 0 CUDA devices"), ("gpu", "not a device"), ("mps", "does not merge on")],
)
def test_a_device_that_is_not_there(base: Path, tmp_path: Path, device: str, text: str) -> None:
    delta = making.delta(base, Lora(rank=2))
    with pytest.raises(InputError, match=text):
        kilodelta.merge(base, delta, tmp_path / "out.safetensors", device=device)
    assert not (tmp_path / "out.safetensors").exists()


def test_infinity_in_a_base_is_told_as_on_the_cpu(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    delta = making.delta(base, Lora(rank=2)).bind(checkpoint)
    target = delta.target("wide.weight")
    data = checkpoint.data(target.name).copy()
    data.view(np.uint16)[40] = 0x7C00
    with pytest.raises(CheckpointError, match=r"wide\.weight holds NaN or infinity"):
        list(stream.merged(delta, target, data, CPU))


def test_merging_in_place_equals_the_merged_file(base: Path, tmp_path: Path) -> None:
    head = RawTensor.copy_of(np.arange(9, dtype=np.float32))
    delta = making.delta(base, Nola(rank=3, bases=130), extras={"norm.bias": head}).bind(base)
    kilodelta.merge(base, delta, tmp_path / "merged.safetensors")
    model = Model(base)
    assert merge_into(model, delta) == delta.manifest.result
    wanted = Model(tmp_path / "merged.safetensors").tensors
    for name, tensor in model.tensors.items():
        assert torch.equal(tensor, wanted[name]), name


def test_a_model_that_is_not_the_base_is_left_alone(base: Path) -> None:
    delta = making.delta(base, Lora(rank=2)).bind(base)
    model = Model(base)
    model.tensors["tall.weight"].data[0, 0] += 1
    before = {name: tensor.clone() for name, tensor in model.tensors.items()}
    with pytest.raises(ProofError, match="nothing was merged"):
        merge_into(model, delta)
    assert all(torch.equal(before[name], t) for name, t in model.tensors.items())


def test_wrong_tensors_are_named(base: Path) -> None:
    delta = making.delta(base, Lora(rank=2)).bind(base)
    model = Model(base)
    model.tensors["tall.weight"].data = model.tensors["tall.weight"].data.float()
    with pytest.raises(BaseMismatchError, match=r"tall\.weight is torch\.float32 \(20, 9\)"):
        merge_into(model, delta)
    model.tensors["other"] = model.tensors.pop("tall.weight")
    with pytest.raises(BaseMismatchError, match=r"no tensor 'tall\.weight'"):
        merge_into(model, delta)


RANK = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from tests.support import making
from tests.support.loaded import Model
from kilodelta.export.merge.in_place import merge_into
from kilodelta.format.methods import Nola, RandLora
base, store, rank = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for method in (Nola(rank=3, bases=130), RandLora(rank=7)):
    delta = making.delta(base, method).bind(base)
    whole, model = Model(base), Model(base)
    merge_into(whole, delta)
    for name, tensor in model.tensors.items():
        cut = Shard(1) if name == "wide.weight" else Shard(0) if tensor.ndim else Replicate()
        model.tensors[name] = distribute_tensor(tensor.data, mesh, [cut])
    assert merge_into(model, delta) == delta.manifest.result
    for name, tensor in model.tensors.items():
        assert torch.equal(tensor.full_tensor(), whole.tensors[name]), name
dist.destroy_process_group()
print("equal")
"""


def test_every_rank_merges_its_shard(base: Path, tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(base), str(tmp_path / "store"), str(rank)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for run in runs:
        out, error = run.communicate(timeout=300)
        assert run.returncode == 0, error
        assert out.strip().endswith("equal")


@pytest.mark.gpu
@pytest.mark.parametrize("method", making.METHODS, ids=making.ids)
def test_a_gpu_gives_the_cpu_bytes(base: Path, tmp_path: Path, method: Method) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    delta = making.delta(base, method)
    kilodelta.merge(base, delta, tmp_path / "cpu.safetensors")
    kilodelta.merge(base, delta, tmp_path / "gpu.safetensors", device="cuda")
    found, wanted = (tmp_path / f"{n}.safetensors" for n in ("gpu", "cpu"))
    assert found.read_bytes() == wanted.read_bytes()
