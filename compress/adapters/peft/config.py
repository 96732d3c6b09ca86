"""`adapter_config.json`: read within limits, each setting checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError, InputError
from kilodelta.expressions import Expressions
from kilodelta.files import canonical, plain

CONFIG = "adapter_config.json"
LIMIT = 1 << 20
"""Bytes of a configuration; PEFT's own take a few kilobytes."""
_FIX = "give the configuration that PEFT wrote beside the adapter"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """An adapter's settings.

    Attributes:
        where: the file, for errors.
        values: the parsed JSON object.
        expressions: matches the regular expressions among them.
    """

    where: Path
    values: Mapping[str, Any]
    expressions: Expressions = field(repr=False)

    def option(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return one setting.

        Args:
            name: its key.
            kind: the types that it may have; a boolean is no number here.
            default: what it is where the file does not say.

        Raises:
            InputError: it is of another type, or no finite number.
        """
        value = self.values.get(name, default)
        types = kind if isinstance(kind, tuple) else (kind,)
        is_wrong = not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
        if is_wrong or not _is_usual(value):
            raise self.wrong(name, value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a setting that is a list of texts; empty where it is null or missing.

        Raises:
            InputError: it is anything else.
        """
        value = self.values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, value)
        return tuple(value)

    def text_or_texts(self, name: str) -> str | frozenset[str]:
        """Return a setting that is one expression or a list of texts.

        Raises:
            InputError: it is anything else.
        """
        value = self.values.get(name)
        return value if isinstance(value, str) else frozenset(self.texts(name))

    @cached_property
    def rank(self) -> int:
        """`r`.

        Raises:
            InputError: it is no positive whole number.
        """
        rank: int = self.option("r", int)
        if rank < 1:
            raise InputError(f"{self.where}: r is {rank}", fix="r is a positive whole number")
        return rank

    def wrong(self, name: str, value: Any) -> InputError:
        """Return the error for a setting whose value makes no sense."""
        return InputError(f"{self.where}: {name} is {value!r:.80}", fix=_FIX)


def _is_usual(value: Any) -> bool:
    """Return whether a number is finite and no larger than a float can be."""
    if not isinstance(value, (int, float)):
        return True
    try:
        return isfinite(value)
    except OverflowError:
        return False


def read_config(folder: Path) -> AdapterConfig:
    """Read the configuration of an adapter's folder.

    Raises:
        CheckpointError: it is missing, too large, or no JSON object.
    """
    place = folder / CONFIG
    try:
        values = canonical.loads(plain.read_model_file(place, LIMIT))
    except OSError as problem:
        raise CheckpointError(
            f"{place} cannot be read: {problem.strerror}",
            fix="give the folder that PEFT's save_pretrained wrote",
        ) from None
    except canonical.NotCanonicalError as problem:
        raise CheckpointError(f"{place} is not JSON: {problem}", fix="fetch it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{place} is not a JSON object", fix="fetch it again")
    return AdapterConfig(where=place, values=values, expressions=Expressions(str(place)))
