"""Checks of the Triton kernels, for a process of their own under TRITON_INTERPRET=1.

`tests/merging/test_kernels.py` runs this file; so does
`TRITON_INTERPRET=1 pytest tests/doubles/interpreted.py`.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from kilodelta.compress.training.packed import SignBases, SignMixer, mix_signs, pack
from kilodelta.errors import SelfTestError
from kilodelta.exact.bases import Stream
from kilodelta.exact.selftest import KNOWN_ANSWERS
from kilodelta.format.methods import METHODS, Method, Nola
from kilodelta.format.methods.nola import gpu as nola_on_gpu
from kilodelta.format.targets import Target
from kilodelta.merging.gpu.on_triton import TritonUnit
from kilodelta.merging.gpu.selftest import require_good_unit
from kilodelta.merging.gpu.sides import sides
from kilodelta.merging.gpu.unit import Bases, UpdateScale

variants = pytest.importorskip("kilodelta.merging.gpu.variants", exc_type=ImportError)
CPU = torch.device("cpu")
SEED = 0xFEDCBA9876543210

assert os.environ.get("TRITON_INTERPRET") == "1", "these kernels need TRITON_INTERPRET=1"


def target_of(*shape: int) -> Target:
    return Target(name="x", dtype="F32", shape=shape, transposed=False, index=0)


SAMPLES = {(m.name, m.variant): m for kind in METHODS.values() for m in kind.samples()}


@pytest.mark.parametrize("method", SAMPLES.values(), ids=str)
def test_every_method_and_dtype_comes_out_as_on_the_cpu(method: Method) -> None:
    require_good_unit(TritonUnit(CPU), method.name, method.variant)


def test_philox_gives_the_known_answer_of_its_authors() -> None:
    counter, key, expected = KNOWN_ANSWERS[0]
    assert counter == (0, 0, 0, 0)
    assert key == (0, 0)
    place = Bases(stream=Stream(0), role=0, lines_are_rows=True)
    for u, word in enumerate(expected):
        q = np.zeros(128, np.int64)
        q[32 * u : 32 * u + 16] = 2 ** np.arange(16)
        drawn = TritonUnit(CPU).mixed(place, q, 1)(range(1))
        assert int(drawn) == 0xFFFF - 2 * (word & 0xFFFF)


def test_pieces_of_either_factor_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sums beyond 2^31 come; `test_kernels.py` has one of those."""
    monkeypatch.setattr(nola_on_gpu, "MOST", 500)
    rng, method, target = np.random.default_rng(3), Nola(rank=2, bases=40), target_of(5, 4)
    large, small = rng.integers(-99, 100, 40), np.eye(1, 40, 7, dtype=np.int64)[0]
    for q in ({"alpha": large, "beta": small}, {"alpha": small, "beta": large}):
        found = sides(method, q, target, Stream(SEED), TritonUnit(CPU))
        out, in_ = found.out(range(5)), found.in_(range(4))
        assert len(out) == len(in_) > 4  # two for each of several pieces
        stream = Stream(SEED)
        wanted = method.left(q, target, stream, range(5)) @ method.right(q, target, stream)
        assert np.array_equal((out.t() @ in_).numpy(), wanted)


@pytest.mark.parametrize("shape", [(3_000_000, 1), (1, 9_000_000)], ids=str)
def test_no_axis_of_a_grid_is_too_long(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA takes 65,535 programs along all axes but the first."""
    grids = []
    monkeypatch.setattr(variants.Variant, "launch", lambda self, grid, *_: grids.append(grid))
    left, right = (torch.zeros(1, size, dtype=torch.int32) for size in shape)
    TritonUnit(CPU).add(torch.zeros(shape), left, right, UpdateScale(c=1, e=0, bound=1))
    [(programs, *others)] = grids
    assert programs >= shape[0] * shape[1] / (32 * 128)
    assert all(size <= 65_535 for size in others)


def test_a_range_of_lines_is_a_slice_of_all() -> None:
    place = Bases(stream=Stream(SEED), role=0, lines_are_rows=False)
    draw = TritonUnit(CPU).picked(place, np.arange(-25, 25), 3, 2, anchor=9, anchor_role=6)
    assert torch.equal(draw(range(40, 60)), draw(range(100))[:, 40:60])


@pytest.mark.parametrize("number", [2**24 + 1, 2**24 + 3, 2**31 + 129, 2**53 - 1, -(2**25) - 1])
def test_numbers_beyond_float32_are_rounded_once_to_nearest_even(number: int) -> None:
    left = torch.tensor([[2**26], [1]], dtype=torch.int32)
    right = torch.tensor([[number >> 26], [number % 2**26]], dtype=torch.int32)
    weights, step = torch.zeros(1, 1), UpdateScale(c=1, e=-3, bound=2**52)
    out, flag = TritonUnit(CPU).add(weights, left, right, step)
    assert out.item() == float(np.float32(np.int64(number))) / 8
    assert not flag.any()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_raises_the_flag(dtype: torch.dtype, bad: float) -> None:
    unit, step = TritonUnit(CPU), UpdateScale(c=1, e=0, bound=1)
    one = torch.ones(1, 1, dtype=torch.int32)
    row = torch.ones(1, 5, dtype=torch.int32)
    weights = torch.zeros(1, 5, dtype=dtype)
    assert not unit.add(weights, one, row, step)[1].any()
    weights[0, 3] = bad
    assert unit.add(weights, one, row, step)[1].any()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_an_update_out_of_range_raises_the_flag() -> None:
    weights = torch.full((1, 1), 65504.0, dtype=torch.float16)
    one = torch.ones(1, 1, dtype=torch.int32)
    unit = TritonUnit(CPU)
    assert not unit.add(weights, one, one, UpdateScale(c=15, e=0, bound=1))[1].any()
    assert unit.add(weights, one, one, UpdateScale(c=16, e=0, bound=1))[1].any()


def test_a_wrong_kernel_does_not_pass_the_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(TritonUnit):
        def add(
            self, weights: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: UpdateScale
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return super().add(
                weights, left, right, UpdateScale(c=scale.c, e=scale.e + 1, bound=scale.bound)
            )

    with pytest.raises(SelfTestError, match="does not reproduce the known values of rounding"):
        require_good_unit(Wrong(CPU), "lora")


@pytest.mark.parametrize("rows", [True, False])
def test_training_sums_equal_those_from_packed_bits(rows: bool) -> None:
    sizes, place = [12, 12, 150], f"{SEED} 1 3 {int(rows)}"
    torch.manual_seed(0)
    packed = pack(Stream(SEED), 1, lines=50, rank=3, bases=136, lines_are_rows=rows)
    coefficients = torch.randn(3, 136)
    drawn = coefficients.clone().requires_grad_()
    kept = coefficients.clone().requires_grad_()
    found = mix_signs(drawn, packed[:0], sizes, place)
    wanted = mix_signs(kept, packed, sizes, place)
    # sums of 136 float32 numbers of size 1: 136 roundings of 2^-24 of at most 40
    torch.testing.assert_close(found, wanted, rtol=0, atol=136 * 40 * 2**-24)
    weight = torch.randn_like(found)
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(drawn.grad, kept.grad, rtol=0, atol=150 * 40 * 2**-24)


def test_gradcheck_in_float64() -> None:
    packed = torch.empty(0, 2, dtype=torch.uint8)
    coefficients = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda c: mix_signs(c, packed, [4, 10], f"{SEED} 0 2 0"), (coefficients,), fast_mode=True
    )


def test_the_operators_obey_torch() -> None:
    packed = torch.empty(0, 2, dtype=torch.uint8)
    coefficients = torch.randn(2, 16, requires_grad=True)
    torch.library.opcheck(
        mix_signs,
        (coefficients, packed, [4, 10], f"{SEED} 0 2 0"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_a_mixer_without_bits_works_under_compile_and_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = {"lines": 6, "rank": 2, "bases": 20}
    bases = SignBases(Stream(SEED), 0, **shape, lines_are_rows=False)
    mixer = SignMixer(bases, [6, 3], 2)
    coefficients = [torch.randn(20), torch.randn(20)]
    wanted = mixer.mix(coefficients)
    monkeypatch.setattr(SignBases, "on", lambda self, device: torch.empty(0, 3, dtype=torch.uint8))
    torch.testing.assert_close(mixer.mix(coefficients), wanted)
    compiled = torch.compile(mixer.mix, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = compiled(coefficients)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)
