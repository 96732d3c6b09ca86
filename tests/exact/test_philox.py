"""The generator and the bases: known answers, then bit equality with the scalar reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kilodelta.errors import SelfTestError
from kilodelta.exact import philox, reference, selftest
from kilodelta.exact.bases import Stream

# Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, expected words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    c, k = words(counter), words(key)
    assert reference.philox((c[0], c[1], c[2], c[3]), (k[0], k[1])) == words(expected)
    out = Stream(k[0] | k[1] << 32).words(
        c[3], range(c[0], c[0] + 1), range(c[1], c[1] + 1), range(c[2], c[2] + 1)
    )
    assert tuple(map(int, out.ravel())) == words(expected)


def test_corners_of_a_sign_and_a_ternary_basis() -> None:
    # Typed in from reference.words(seed 1, row, column, block 0, role), bit 0 of word 0 and so on.
    drawn = [[reference.sign(1)(0, i, 0, c) for c in range(3)] for i in (0, 31, 32, 127, 128)]
    stream = Stream(1)
    for base, row in zip((0, 31, 32, 127, 128), drawn, strict=True):
        assert stream.sign(0, base, range(1), range(3)).tolist() == [row]
    w = reference.words(1, 0, 0, 0, 0)
    assert drawn[0][0] == (-1 if w[0] & 1 else 1)
    assert drawn[1][0] == (-1 if w[0] >> 31 else 1)
    assert drawn[2][0] == (-1 if w[1] & 1 else 1)
    assert drawn[3][0] == (-1 if w[3] >> 31 else 1)


SEEDS = st.integers(0, 2**64 - 1)
SPANS = st.tuples(st.integers(0, 2**32 - 20), st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(SEEDS, SPANS, SPANS, st.integers(1, 300), st.integers(0, 8), st.integers(2, 16))
def test_mixing_is_the_sum_of_sign_bases(
    seed: int, y: tuple[int, int], x: tuple[int, int], k: int, role: int, bits: int
) -> None:
    rng = np.random.default_rng(k)
    top = 2 ** (bits - 1) - 1
    q = rng.integers(-top, top + 1, k).astype(np.int16)
    rows, columns = range(y[0], y[0] + y[1]), range(x[0], x[0] + x[1])
    entry = reference.sign(seed)
    expected = [
        [sum(int(q[i]) * entry(role, i, r, c) for i in range(k)) for c in columns] for r in rows
    ]
    assert Stream(seed).mix(role, q, rows, columns).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(SEEDS, SPANS, st.integers(1, 150), st.integers(1, 9))
def test_signed_and_ternary_values(seed: int, y: tuple[int, int], n: int, sparsity: int) -> None:
    rows, columns = range(y[0], y[0] + y[1]), range(2, 4)
    values = np.random.default_rng(n).integers(-127, 128, (n, 4)).astype(np.int8)
    stream = Stream(seed)
    for entry, drawn in (
        (reference.sign(seed), stream.signs(3, values, rows, columns)),
        (reference.ternary(seed, sparsity), stream.ternary(3, sparsity, values, rows, columns)),
    ):
        expected = [
            [[int(values[j, c]) * entry(3, j, r, c) for j in range(n)] for c in columns]
            for r in rows
        ]
        assert drawn.tolist() == expected


@settings(max_examples=40, deadline=None)
@given(SEEDS, SPANS, st.integers(1, 5000), st.integers(0, 2**20))
def test_picks(seed: int, y: tuple[int, int], k: int, target: int) -> None:
    theta = np.arange(1, k + 1, dtype=np.int32)
    rows, columns = range(y[0], y[0] + y[1]), range(3)
    expected = []
    for r in rows:
        for c in columns:
            w = reference.words(seed, r, c, target, 7)
            expected.append(int(theta[w[0] * k >> 32]) * (-1 if w[1] & 1 else 1))
    found = Stream(seed).pick(7, target, theta, rows, columns)
    assert found.ravel().tolist() == expected


def test_any_slice_equals_the_whole_s_slice() -> None:
    stream, q = Stream(9), np.arange(-100, 100).astype(np.int16)
    whole = stream.mix(0, q, range(40), range(700))
    for rows, columns in (
        (range(3, 5), range(250, 520)),
        (range(39, 40), range(1)),
        (range(40), range(699, 700)),
    ):
        part = stream.mix(0, q, rows, columns)
        assert np.array_equal(part, whole[rows.start : rows.stop, columns.start : columns.stop])


def test_a_broken_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> None:
        out = arguments[-1]
        assert isinstance(out, np.ndarray)
        out[...] = 0

    monkeypatch.setattr(philox, "mix", wrong)
    selftest.require_good_kernels.cache_clear()
    with pytest.raises(SelfTestError, match="basis kernels does not reproduce the golden values"):
        selftest.require_good_kernels()
    monkeypatch.undo()
    selftest.require_good_kernels()


def test_sums_beyond_32_bits_are_exact() -> None:
    """300000 coefficients of 16 bits: half of their magnitudes is more than the kernel's words."""
    generator = np.random.default_rng(0)
    for q in (
        np.full(300_000, -32767, np.int16),
        generator.integers(32000, 32768, 300_000).astype(np.int16),
        (generator.integers(0, 2, 300_000) * 2 - 1).astype(np.int16) * np.int16(32767),
    ):
        assert np.abs(q.astype(np.int64)).sum() > 1 << 33
        stream, rows, columns = Stream(11), range(3, 5), range(2, 5)
        words = stream.words(0, rows, columns, range(-(-len(q) // 128)))
        bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
        signs = 1 - 2 * bits.reshape(2, 3, -1)[:, :, : len(q)].astype(np.int64)
        assert np.array_equal(stream.mix(0, q, rows, columns), signs @ q.astype(np.int64))
