"""Regular expressions of a file that nobody vouches for, matched as `re` does, within limits.

PEFT and compressed-tensors give them to `re`, which a few characters can keep busy for years. The
`regex` package, which transformers needs anyway, takes the same expressions and a limit of time.
Where it is missing, expressions that cannot take long are matched by `re`.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from kilodelta.errors import InputError, KiloDeltaError, require

MAX_TEXT = 64 << 10
"""Characters of all expressions of one file together, because compiling takes time."""
SECONDS = 4.0
"""Processor time for all matches of one file together."""
_REPEATED = re.compile(r"[*+{]")
_OF_A_GROUP = re.compile(r"\)[*+{?]")
_MAX_REPEATED = 3


class Expressions:
    """Matches one file's expressions; all of them share one budget of time and text.

    Args:
        where: the file, for errors.
        error: the class of errors about it.
    """

    def __init__(self, where: str, *, error: type[KiloDeltaError] = InputError) -> None:
        self._where, self._error = where, error
        self._left = SECONDS
        self._text = 0
        self._compiled: dict[str, Any] = {}

    def covers(self, pattern: str, text: str) -> bool:
        """Return whether an expression matches a whole text, as `re.fullmatch`.

        Raises:
            InputError: it is no regular expression, or takes too long.

        Example:
            >>> Expressions("adapter").covers(r".*\\.(query|key)", "layer.0.query")
            True
        """
        return self._match(f"(?:{pattern})\\Z", pattern, text)

    def begins(self, pattern: str, shown: str, text: str) -> bool:
        """Return whether an expression matches the begin of a text, as `re.match`.

        Args:
            pattern: the expression.
            shown: the part of it that stands in the adapter's configuration, for errors.
            text: what it is matched with.

        Raises:
            InputError: it is no regular expression, or takes too long.
        """
        return self._match(pattern, shown, text)

    def first(self, pattern: str, shown: str, text: str) -> str | None:
        """Return what the group `idx` matched at the begin of a text; None where nothing matches.

        Raises:
            InputError: as `begins`.
        """
        match = self._timed(pattern, shown, text)
        return None if match is None else str(match["idx"])

    def _match(self, pattern: str, shown: str, text: str) -> bool:
        return self._timed(pattern, shown, text) is not None

    def _timed(self, pattern: str, shown: str, text: str) -> Any:
        from time import process_time

        compiled = self._compile(pattern, shown)
        if isinstance(compiled, re.Pattern):
            return compiled.match(text)
        began = process_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            return compiled.match(text, timeout=self._left)
        except TimeoutError:
            raise self._error(
                f"{self._where}: the expression {shown!r:.80} takes too long to match",
                fix="name the modules in a list instead",
            ) from None
        finally:
            self._left -= process_time() - began

    def _compile(self, pattern: str, shown: str) -> Any:
        if pattern in self._compiled:
            return self._compiled[pattern]
        regex: Any = re
        if not is_quick(pattern) or importlib.util.find_spec("regex") is not None:
            regex = require("regex", extra="hf", why=f"match the expressions of {self._where}")
        self._text += len(pattern)
        if self._text > MAX_TEXT:
            raise self._error(
                f"{self._where} holds more than {MAX_TEXT} characters of expressions",
                fix="name modules by their last part, such as q_proj",
            )
        try:
            compiled = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as problem:
            raise self._error(
                f"{self._where} has {shown!r:.80}, no regular expression: {problem!s:.80}",
                fix="give the configuration that the tool wrote",
            ) from None
        self._compiled[pattern] = compiled
        return compiled


def is_quick(pattern: str) -> bool:
    """Return whether `re` cannot take long over an expression and a module's name.

    A match backtracks at most over the name's length to the power of the repetitions, unless a
    group is repeated.

    Example:
        >>> is_quick(r".*self_attn\\.(q|k|v)_proj"), is_quick("(a|b)+")
        (True, False)
    """
    return len(_REPEATED.findall(pattern)) <= _MAX_REPEATED and not _OF_A_GROUP.search(pattern)
