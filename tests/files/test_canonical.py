"""JSON of strangers: bounded in depth and numbers, with one error for all that is wrong."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilodelta.files import canonical
from kilodelta.files.canonical import NotCanonicalError

texts = st.text(st.characters(codec="utf-8"), max_size=5)
numbers = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=9,
)


@given(value=values)
def test_there_and_back(value: Any) -> None:
    text = canonical.dumps(value)
    assert canonical.loads(text.encode()) == value == json.loads(text)
    assert canonical.dumps(canonical.loads(text.encode())) == text


@given(
    text=st.binary(max_size=40) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "replace"))
)
def test_any_bytes_give_a_value_or_the_one_error(text: bytes) -> None:
    for parse in (canonical.loads, canonical.loads_foreign):
        with contextlib.suppress(NotCanonicalError):
            parse(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"\xff", "utf-8"),
        (b"{", "Expecting"),
        (b'{"a":1,"a":2}', "stands twice"),
        (b"NaN", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b"1e999", "Out of range"),
        (b"[" * 65 + b"]" * 65, "nested too deeply"),
        (b"[" * 9_999 + b"]" * 9_999, "nested too deeply"),
        (b"[" * 999_999, "nested too deeply"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested too deeply"),
        (b"1" * 301, "301 digits"),
        (b"-" + b"1" * 99_999, "100000 digits"),
    ],
    ids=range(13),
)
def test_what_is_refused(text: bytes, what: str) -> None:
    with pytest.raises(NotCanonicalError, match=what):
        canonical.loads(text)


def test_the_largest_that_is_taken() -> None:
    assert canonical.loads(b"[" * 64 + b"]" * 64)
    assert float(canonical.loads(b"9" * 300)) == 1e300


def test_other_tools_json() -> None:
    assert canonical.loads_foreign(b'\xef\xbb\xbf{"a":1,"a":[Infinity]}') == {"a": [float("inf")]}
    for text in (b"[" * 65 + b"]" * 65, b"1" * 301, b"{", b"\xff"):
        with pytest.raises(NotCanonicalError):
            canonical.loads_foreign(text)
