"""SHA-256 of two streams at a time: known answers, hashlib, and machines that cannot do it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kilodelta.exact import sha256

CPUINFO = Path("/proc/cpuinfo")
KNOWN = (
    (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    (
        b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
    ),
    (
        b"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmn"
        b"hijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
        "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1",
    ),
    (b"a" * 1000000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
)
"""NIST's examples of FIPS 180-4: one block, two, many, and the empty message."""

needs_pairs = pytest.mark.skipif(
    not sha256.has_pairs(), reason="the processor, or numba for it, has no SHA instructions"
)


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """What was found out about this machine is forgotten before the test and after it."""
    sha256.has_pairs.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    sha256.has_pairs.cache_clear()


def test_a_processor_with_the_instructions_uses_them() -> None:
    """A fault that makes numba refuse the code would show here alone: the digests stay right."""
    if (
        platform.machine() != "x86_64"
        or not CPUINFO.exists()
        or "sha_ni" not in CPUINFO.read_text()
    ):
        pytest.skip("not one of x86-64 with SHA instructions")
    assert sha256.has_pairs()
    assert isinstance(sha256.new(), sha256.Sha256)


@needs_pairs
@pytest.mark.parametrize("number", range(len(KNOWN)))
def test_known_answers(number: int) -> None:
    text, digest = KNOWN[number]
    other, other_digest = KNOWN[number - 1]
    assert sha256.Sha256(text).hexdigest() == digest
    first, second = sha256.Sha256(), sha256.Sha256()
    sha256.update_both(first, text, second, other)
    assert (first.hexdigest(), second.hexdigest()) == (digest, other_digest)


@needs_pairs
def test_every_way_to_cut_a_message_round_its_blocks() -> None:
    data = np.random.default_rng(0).integers(0, 256, 200, np.uint8).tobytes()
    for cut in range(len(data)):
        first, second = sha256.Sha256(data[:cut]), sha256.Sha256(data[cut:])
        sha256.update_both(first, data[cut:], second, data[:cut])
        assert first.hexdigest() == hashlib.sha256(data).hexdigest(), cut
        assert second.hexdigest() == hashlib.sha256(data[cut:] + data[:cut]).hexdigest(), cut


@needs_pairs
def test_random_lengths_in_random_parts() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = (sha256.Sha256(), sha256.Sha256()), (hashlib.sha256(), hashlib.sha256())
    for _ in range(200):
        first, second = (rng.integers(0, 256, rng.integers(0, 1000), np.uint8) for _ in "ab")
        if rng.integers(2):
            sha256.update_both(ours[0], first.data, ours[1], second.data)
        else:
            ours[0].update(first.data)
            ours[1].update(second.data)
        theirs[0].update(first.data)
        theirs[1].update(second.data)
        # a digest is also had in between, and more may follow
        assert [a.hexdigest() for a in ours] == [b.hexdigest() for b in theirs]


@pytest.mark.parametrize(
    ("triple", "features"),
    [
        ("aarch64-unknown-linux-gnu", "+sha2,+sha,+sse4.1"),
        ("x86_64-unknown-linux-gnu", "+sse4.1,-sha"),
        ("x86_64-unknown-linux-gnu", ""),
    ],
)
def test_without_the_instructions_nothing_is_compiled(
    triple: str, features: str, unasked: pytest.MonkeyPatch
) -> None:
    """LLVM would end the process, not raise an error."""
    from numba.core.registry import cpu_target

    codegen = type(cpu_target.target_context.codegen())
    unasked.setattr(codegen, "magic_tuple", lambda _: (triple, "some", features))
    unasked.setattr(sha256, "_one", None)
    unasked.setattr(sha256, "_two", None)
    require_hashlib()


def test_an_instruction_that_computes_wrongly_is_not_used(unasked: pytest.MonkeyPatch) -> None:
    unasked.setattr(sha256, "_has_instructions", lambda: True)
    unasked.setattr(sha256, "_one", lambda *arguments: None)
    unasked.setattr(sha256, "_two", lambda *arguments: None)
    require_hashlib()


def test_code_that_numba_cannot_compile_is_not_used(unasked: pytest.MonkeyPatch) -> None:
    def fails() -> bool:
        raise TypeError("of any kind")

    unasked.setattr(sha256, "_has_instructions", fails)
    require_hashlib()


def require_hashlib() -> None:
    """Check that hashlib's hashes do the same work."""
    assert not sha256.has_pairs()
    first, second = sha256.new(b"a"), sha256.new()
    assert type(first) is type(hashlib.sha256())
    sha256.update_both(first, b"bc", second, KNOWN[2][0])
    assert (first.hexdigest(), second.hexdigest()) == (KNOWN[1][1], KNOWN[2][1])
