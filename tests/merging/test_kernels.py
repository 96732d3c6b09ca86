"""The GPU's kernels without a GPU: interpreted, compiled ahead of time, and by torch operations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.errors import InputError, SelfTestError
from kilodelta.exact.bases import Stream
from kilodelta.format.methods import METHODS, Lora, Method, Nola
from kilodelta.format.methods.nola.spec import ROLE_A
from kilodelta.format.targets import Target
from kilodelta.merging.gpu import choose
from kilodelta.merging.gpu.on_torch import TorchUnit
from kilodelta.merging.gpu.selftest import require_good_unit
from kilodelta.merging.gpu.sides import sides
from kilodelta.merging.gpu.unit import Bases, Draw, UpdateScale

variants = pytest.importorskip("kilodelta.merging.gpu.variants", exc_type=ImportError)
ROOT = Path(__file__).parents[2]
KINDS = list({(m.name, m.variant): m for kind in METHODS.values() for m in kind.samples()}.values())
RUNS = [variant for variant in variants.ALL if "fp64" not in variant.name]
"""What a GPU runs; float64 is for checking gradients in the interpreter."""

QUICK = [v for v in RUNS if "BF16" in v.name or v.name in ("mixed-rows", "backward-rows-fp32")]
CAPABILITIES = (80, 87, 89, 90, 120)


def test_the_interpreted_kernels_pass_their_checks() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "tests/doubles/interpreted.py",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.fixture
def own_triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")


def assembly(variant: Any, capability: int) -> str:
    """The PTX of a variant that was assembled too, with what must hold for all of them."""
    compiled = variant.compile(capability)
    ptx: str = compiled.asm["ptx"]
    assert compiled.asm["cubin"]
    assert ".ftz" not in ptx, "subnormal numbers would be flushed"
    if "low_rank" in variant.name or "by_int8" in variant.name:
        assert "cvt.rn.f32.s64" in ptx, "int64 must become float32 with one rounding"
    return ptx


@pytest.mark.usefixtures("own_triton_cache")
@pytest.mark.parametrize("variant", QUICK, ids=lambda v: v.name)
def test_a_kernel_compiles_for_ada(variant: Any) -> None:
    ptx = assembly(variant, 89)
    if variant.name == "mixed-rows":
        assert "popc.b32" in ptx, "LLVM no longer sees the population count"
    if "by_int8" in variant.name:
        assert "s8.s8.s32" in ptx, "the product left the tensor cores"


@pytest.mark.usefixtures("own_triton_cache")
@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("variant", RUNS, ids=lambda v: v.name)
def test_every_kernel_compiles_for_every_gpu(variant: Any, capability: int) -> None:
    assembly(variant, capability)


@pytest.mark.usefixtures("own_triton_cache")
def test_a_broken_kernel_does_not_compile() -> None:
    broken = variants.Variant(
        name="broken",
        kernel=variants.BY_INT8["F32"].kernel,
        types={**variants.BY_INT8["F32"].types, "left": "*fp32"},
        constants=variants.BY_INT8["F32"].constants,
    )
    with pytest.raises(Exception, match=r"same dtype|Both operands"):
        broken.compile(89)


@pytest.mark.parametrize("method", KINDS, ids=str)
def test_torch_operations_equal_the_cpu_kernels(method: Method) -> None:
    unit = choose.unit_for(torch.device("cpu"), method)
    assert isinstance(unit, TorchUnit)


class Counting(TorchUnit):
    """Keeps the sums of magnitudes that it was asked for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.sums: list[int] = []

    def mixed(self, bases: Bases, q: Any, rank: int) -> Draw:
        self.sums.append(int(np.abs(q.astype(np.int64)).sum()))
        return super().mixed(bases, q, rank)


def test_nola_sums_beyond_31_bits_equal_the_cpus() -> None:
    """Every sign of alpha is that of the first column's entry, so its sum is the largest there is:
    66,000 times 32,767, which is more than 2^31."""
    method, seed = Nola(rank=1, bases=66_000), Stream(2**63 + 5)
    target = Target(name="x", dtype="F32", shape=(3, 2), transposed=False, index=0)
    words = seed.words(ROLE_A, range(1), range(1), range(-(-method.bases // 128)))
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: method.bases]
    beta = np.zeros(method.bases, np.int16)
    beta[[0, 5, 65_999]] = 3, -7, 1
    q = {"alpha": (32767 * (1 - 2 * bits.astype(np.int64))).astype(np.int16), "beta": beta}
    left, right = method.left(q, target, seed, range(3)), method.right(q, target, seed)
    assert right[0, 0] == 66_000 * 32_767 > 2**31
    unit = Counting()
    found = sides(method, q, target, seed, unit)
    assert unit.sums == [11, 65_537 * 32_767, 463 * 32_767]  # below 2^31, as units want them
    scale = UpdateScale(c=1, e=-35, bound=method.bound(q))
    out, _ = unit.add(torch.zeros(3, 2), found.out(range(3)), found.in_(range(2)), scale)
    assert np.array_equal(out.numpy(), (left @ right).astype(np.float32) * np.float32(2.0**-35))


@pytest.mark.parametrize("wrong", [{"c": 1}, {"e": 1}])
def test_a_device_that_computes_wrongly_is_refused(wrong: dict[str, int]) -> None:
    class Wrong(TorchUnit):
        def add(
            self, weights: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: UpdateScale
        ) -> tuple[torch.Tensor, torch.Tensor]:
            off = UpdateScale(
                c=scale.c + wrong.get("c", 0), e=scale.e + wrong.get("e", 0), bound=scale.bound
            )
            return super().add(weights, left, right, off)

    with pytest.raises(SelfTestError, match="torch on cpu does not reproduce the known values"):
        require_good_unit(Wrong(torch.device("cpu")), "lora")


class Wide(Lora):
    """A LoRA whose left factor is 2^24 times its coefficients, which no GPU's int32 holds."""

    def left(self, q: Any, target: Target, stream: Stream, rows: range) -> Any:
        return super().left(q, target, stream, rows).astype(np.int64) << 24


def test_factors_from_the_cpu_must_fit_a_device() -> None:
    target = Target(name="x", dtype="F32", shape=(3, 2), transposed=False, index=0)
    unit = TorchUnit(torch.device("cpu"))
    for top, fits in ((127, True), (128, False)):
        q = {"A": np.ones((1, 2), np.int16), "B": np.full((3, 1), top, np.int16)}
        if fits:
            found = sides(Wide(rank=1), q, target, Stream(0), unit)
            assert (found.out(range(3)).t() @ found.in_(range(2))).tolist() == [[127 << 24] * 2] * 3
        else:
            with pytest.raises(InputError, match="entries that a GPU's int32 cannot hold"):
                sides(Wide(rank=1), q, target, Stream(0), unit)


def test_kernels_without_a_sample_are_not_trusted() -> None:
    with pytest.raises(SelfTestError, match="lora has no sample of its variant 'sparse'"):
        require_good_unit(TorchUnit(torch.device("cpu")), "lora", "sparse")
