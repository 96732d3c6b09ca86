"""Fields of strangers: each kind of value, right and wrong, and never another exception."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kilodelta.files import untrusted
from kilodelta.files.untrusted import FieldError

DIGEST = "sha256:" + "0f" * 32
CHECKS: dict[str, tuple[Callable[[Any, str], Any], list[Any], list[Any]]] = {
    "text": (untrusted.text, ["", "é" * 1024], ["x" * 1025, 1, None, ["x"]]),
    "texts": (untrusted.texts, [[], ["a"]], ["a", [1], {"a": 1}]),
    "whole": (untrusted.whole, [0, 2**63 - 1], [-1, 2**63, True, 1.0, "1", 10**4000]),
    "number": (untrusted.number, [0, -1.5, 2**64], [2**65, 10**4000, True, "1", float("nan")]),
    "flag": (untrusted.flag, [True, False], [0, 1, None, "true"]),
    "digest": (untrusted.digest, [DIGEST], [DIGEST[:-1], DIGEST + "\n", DIGEST.upper(), 0]),
    "file_name": (
        untrusted.file_name,
        ["a", "model.onnx", "..."],
        ["", ".", "..", "a/b", "a\\b", "c:", "a\nb", "a\0", "\x1b[2J", "\u202e", "x" * 1025, 1],
    ),
    "mapping": (untrusted.mapping, [{}, {"a": 1}], [[], None, "a"]),
}


@pytest.mark.parametrize("name", CHECKS)
def test_what_is_taken_and_what_is_refused(name: str) -> None:
    check, right, wrong = CHECKS[name]
    for value in right:
        assert check(value, "field") == (tuple(value) if isinstance(value, list) else value)
    for value in wrong:
        with pytest.raises(FieldError, match="field"):
            check(value, "field")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=5,
)


@given(value=values)
def test_any_value_gives_itself_or_the_one_error(value: Any) -> None:
    checks = [check for check, _, _ in CHECKS.values()]
    checks.append(partial(untrusted.choice, options=("a", "b")))
    checks.append(partial(untrusted.table, keys={"a"}, optional={"b"}))
    for check in checks:
        try:
            check(value, "field")
        except FieldError as error:
            message = str(error)
            assert message.startswith("field")
            assert len(message) < 300


def test_keys() -> None:
    assert untrusted.table({"a": 1}, "it", {"a"}, {"b"}) == {"a": 1}
    assert untrusted.table({"a": 1, "b": 2}, "it", {"a"}, {"b"}) == {"a": 1, "b": 2}
    with pytest.raises(FieldError, match="it has an unknown key 'c'"):
        untrusted.table({"a": 1, "c": 2}, "it", {"a"}, {"b"})
    with pytest.raises(FieldError, match="it lacks 'a'"):
        untrusted.table({"b": 1}, "it", {"a"}, {"b"})


@pytest.mark.parametrize("sizes", [[2**62, 2], [2**62, 2**62, 0], [2**40] * 500])
def test_a_shape_has_a_number_of_elements_that_can_be_printed(sizes: list[int]) -> None:
    """Python refuses to print a number of more than 4300 digits."""
    with pytest.raises(FieldError, match="field has more elements than can be counted"):
        untrusted.shape(sizes, "field")
    assert untrusted.shape([2**62, 0], "field") == (2**62, 0)
