"""Every method against the paper's formula as scalar loops, and merged bytes likewise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kilodelta.errors import InputError
from kilodelta.exact import fused, products, reference
from kilodelta.exact.bases import Ints
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora, Method, Nola, RandLora, UniLora, Vera
from kilodelta.format.targets import Patterns
from kilodelta.merging import cpu
from tests.support.making import METHODS, PATTERNS, delta, ids, model, write


def check_against_reference(found: Delta, base: Checkpoint) -> None:
    for name, target in found.targets.items():
        q = {group: values.tolist() for group, values in found.coefficients(name).items()}
        dq = found.method.scalar(q, target.matrix, found.manifest.seed, target.index)
        assert np.array_equal(found.expand(name), np.array(dq)), name
        c, e = found.scale(name)
        weights = base.data(name).tobytes()
        expected = reference.merge(target.dtype, weights, target.shape, target.transposed, c, e, dq)
        parts = cpu.merged(found, target, base.data(name))
        assert b"".join(part.tobytes() for part in parts) == expected, name
        assert expected != weights, f"{name} did not change: the test would prove nothing"


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_kernels_equal_the_formula(method: Method, bits: int, tmp_path: Path) -> None:
    if isinstance(method, RandLora) and bits == 16:
        pytest.skip("randlora has 4 or 8 bits")
    base = write(tmp_path / "base.safetensors", model())
    found = delta(base, method, bits=bits)
    assert [t.name for t in found.layout or ()] == [
        "conv.weight", "embed.weight", "h.0.c_attn.weight", "tall.weight", "wide.weight"
    ]  # fmt: skip
    check_against_reference(found, Checkpoint.open(base))


@st.composite
def methods(draw: st.DrawFn) -> Method:
    rank = draw(st.integers(1, 6))
    kind = draw(st.sampled_from(["nola", "randlora", "ternary", "lora", "vera", "unilora"]))
    if kind == "nola":
        return Nola(rank=rank, bases=draw(st.integers(1, 140)))
    if kind == "randlora":
        return RandLora(rank=rank)
    if kind == "ternary":
        return RandLora(rank=rank, basis="ternary", sparsity=draw(st.integers(1, 20)))
    if kind == "lora":
        return Lora(rank=rank)
    if kind == "vera":
        return Vera(rank=rank)
    anchor = draw(st.integers(-50, 50))
    return UniLora(rank=rank, bases=draw(st.integers(1, 60)), anchor=anchor)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    method=methods(),
    rows=st.integers(1, 12),
    columns=st.integers(6, 14),
    dtype=st.sampled_from(["F32", "F16", "BF16"]),
    turned=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_shape_rank_and_seed(
    method: Method,
    rows: int,
    columns: int,
    dtype: str,
    turned: bool,
    seed: int,
    tmp_path: Path,
) -> None:
    from tests.support.making import bits_of

    values = np.random.default_rng(rows).normal(size=(rows, columns))
    base = tmp_path / "base.safetensors"
    write(base, {"w": (dtype, (rows, columns), bits_of(dtype, values))})
    patterns = Patterns(include=("w",), transposed=("w",) if turned else ())
    found = delta(base, method, patterns=patterns, seed=seed)
    for name, target in found.targets.items():
        q = {g: v.tolist() for g, v in found.coefficients(name).items()}
        dq = method.scalar(q, target.matrix, seed)
        assert np.array_equal(found.expand(name), np.array(dq))
        c, e = found.scale(name)
        data = Checkpoint.open(base).data(name)
        parts = cpu.merged(found, target, data)
        merged = b"".join(part.tobytes() for part in parts)
        assert merged == reference.merge(dtype, data.tobytes(), target.shape, turned, c, e, dq)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_the_bound_is_never_below_what_an_update_reaches(method: Method, tmp_path: Path) -> None:
    found = delta(write(tmp_path / "base.safetensors", model()), method)
    for name in found.targets:
        bound = method.bound(found.coefficients(name))
        assert np.abs(found.expand(name)).max() <= bound


def test_large_ranks_take_the_other_products(tmp_path: Path) -> None:
    """Above `fused.FEW` columns: int8 for LoRA, float64 for VeRA; both equal int64."""
    rng = np.random.default_rng(0)
    from tests.support.making import bits_of

    values = {"w": ("F32", (70, 50), bits_of("F32", rng.normal(size=(70, 50))))}
    base = write(tmp_path / "base.safetensors", values)
    for method in (Lora(rank=40), Vera(rank=45), RandLora(rank=9)):
        found = delta(base, method, patterns=Patterns(include=("w",)))
        factors = found.factors("w")
        assert factors.left.shape[1] > fused.FEW
        wide = factors.left.astype(np.int64) @ factors.right.astype(np.int64)
        assert np.array_equal(found.expand("w"), wide)
        check_against_reference(found, Checkpoint.open(base))


def test_the_float32_fallback_equals_the_int8_unit_and_int64() -> None:
    rng = np.random.default_rng(3)
    left = rng.integers(-127, 128, (37, 2100)).astype(np.int8)
    right = rng.integers(-127, 128, (2100, 29)).astype(np.int8)
    left[0], right[:, 0] = 127, -127
    wide = left.astype(np.int64) @ right.astype(np.int64)
    assert np.array_equal(products.by_float32(right, 2**26)(left), wide)
    assert np.array_equal(products.product(left, right, 2**26), wide)
    spans = products.float32_spans(left, right)
    assert len(spans) > 1
    assert [s.start for s in spans[1:]] == [s.stop for s in spans[:-1]]


def test_strides_of_single_rows_do_not_mislead_the_int8_unit() -> None:
    """numpy calls a (1, 6) array contiguous whatever its first stride; torch does not."""
    row = np.arange(1, 7, dtype=np.int8).reshape(6, 1).T
    assert np.ascontiguousarray(row).strides != (6, 1)
    assert products.product(np.full((1, 1), 3, np.int8), row, 18).tolist() == [
        [3, 6, 9, 12, 15, 18]
    ]


def test_a_saturating_unit_is_found_out() -> None:
    def multiply(left: Ints, right: Ints) -> Ints:
        # x86 without VNNI: unsigned times signed bytes, pairs added with saturation to 16 bits.
        raised, wide = left.astype(np.int64) + 128, right.astype(np.int64)
        pairs = raised[:, ::2, None] * wide[None, ::2] + raised[:, 1::2, None] * wide[None, 1::2]
        found: Ints = np.clip(pairs, -32768, 32767).sum(axis=1) - 128 * wide.sum(axis=0)
        return found

    assert not products.passes_self_test(lambda right, bound: lambda left: multiply(left, right))
    assert products.passes_self_test(products.by_float32)


@pytest.mark.parametrize("slow", [products.by_torch, products.by_float32])
def test_the_faster_of_the_right_int8_units_is_taken(
    slow: products.Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    if not products.passes_self_test(products.by_torch):
        pytest.skip("torch's int8 product saturates on this processor")
    monkeypatch.setattr(products, "_seconds", lambda unit: float(unit is slow))
    chosen = products._int8_unit.__wrapped__()
    assert chosen is not slow
    assert chosen in (products.by_torch, products.by_float32)


def test_a_delta_read_alone_says_that_it_needs_its_base(tmp_path: Path) -> None:
    found = delta(write(tmp_path / "base.safetensors", model()), Lora(rank=2))
    found.save(tmp_path / "task.kd")
    import kilodelta

    with pytest.raises(InputError, match="does not know its targets' shapes"):
        kilodelta.load(tmp_path / "task.kd").expand("tall.weight")
    with pytest.raises(InputError, match=r"'norm\.weight' is not a target"):
        kilodelta.load(tmp_path / "task.kd", base=tmp_path / "base.safetensors").expand(
            "norm.weight"
        )
    assert PATTERNS.exclude == ("norm*",)
