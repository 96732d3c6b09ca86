"""Turn the table `compress` of a fleet's fine-tunes into options of a compression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kilodelta.compress.distill.options import Options, check, options_from

_ALONE = ("budget", "method", "rank", "bases", "lr")
"""What `kilodelta compress` tells apart from a value that was not given."""


def compression_options(table: Mapping[str, Any], *, learns: bool, **more: Any) -> Options:
    """Return checked options.

    Args:
        table: fields of `schema.COMPRESS`, each of its type.
        learns: whether there are inputs to learn from.
        more: further fields of `Options`.

    Raises:
        InputError: a value is out of its range, or options do not belong together.

    Example:
        >>> compression_options({"budget": "12KB", "bits": 8}, learns=True).budget
        12000
    """
    given: dict[str, Any] = {**dict.fromkeys(_ALONE), **table}
    bits = given.pop("bits", None)
    globs: dict[str, Any] = {
        name: tuple(given[name]) for name in ("targets", "exclude") if name in given
    }
    given |= globs
    options = options_from(bits=None if bits is None else str(bits), **given, **more)
    check(options, learns=learns)
    return options
