"""A method as the manifest writes it: its name and its options, each checked.

docs/format.md, sections 3 and 9.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from kilodelta.format.fields import choice, digest, fault, keys, number, whole
from kilodelta.format.foreign import COMPAT, Compat
from kilodelta.format.methods import METHODS, Method, RandLora

MAX_RANK = 4096
MAX_BASES = 1 << 24
MAX_SIDE = 1 << 24
MAX_PLACES = 1 << 40

FORMS: Mapping[str, Any] = MappingProxyType({**METHODS, **COMPAT})
"""Exact methods and compatibility forms by name."""


def method_options(method: Method | Compat) -> dict[str, Any]:
    """A method as the manifest writes it; `sparsity` only with ternary bases."""
    options = {option.name: getattr(method, option.name) for option in fields(method)}  # type: ignore[arg-type]
    if method.name == RandLora.name and options["basis"] == "sign":
        del options["sparsity"]
    return {"name": method.name, **options}


def parse_method(value: Any) -> Method | Compat:
    """Read a method, trusting nothing.

    Raises:
        FileError: naming the option that breaks a rule.
    """
    if not isinstance(value, dict) or value.get("name") not in FORMS:
        name = value.get("name") if isinstance(value, dict) else value
        raise fault(f"method {name!r:.80} is unknown; known are {', '.join(FORMS)}")
    kind = FORMS[value["name"]]
    names = {option.name for option in fields(kind)}
    if kind is RandLora and value.get("basis") != "ternary":
        names.remove("sparsity")
    options = dict(keys(value, "method", {"name", *names}))
    del options["name"]
    for name, item in options.items():
        _OPTIONS[name](item, kind.name)
    found: Method | Compat = kind(**options)
    return found


_CHOICES: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("nola", "basis"): ("sign",),
        ("randlora", "basis"): ("sign", "ternary"),
        **{
            (form.name, option): allowed
            for form in COMPAT.values()
            for option, allowed in form.choices.items()
        },
    }
)


def _chosen(option: str) -> Callable[[Any, str], object]:
    return lambda value, method: choice(value, f"method.{option}", _CHOICES[method, option])


def _ranged(option: str, low: int, high: int) -> Callable[[Any, str], object]:
    return lambda value, method: whole(value, f"method.{option}", low, high)


_OPTIONS: Mapping[str, Callable[[Any, str], object]] = MappingProxyType(
    {
        "rank": _ranged("rank", 1, MAX_RANK),
        "bases": _ranged("bases", 1, MAX_BASES),
        "basis": _chosen("basis"),
        "sparsity": _ranged("sparsity", 1, 1 << 20),
        "anchor": _ranged("anchor", -32767, 32767),
        "alpha": lambda value, method: number(value, "method.alpha"),
        "dtype": _chosen("dtype"),
        "layout": _chosen("layout"),
        "start": _chosen("start"),
        "large": _ranged("large", 1, MAX_SIDE),
        "small": _ranged("small", 1, MAX_SIDE),
        "height": _ranged("height", 1, MAX_SIDE),
        "total": _ranged("total", 1, MAX_PLACES),
        "width": _ranged("width", 1, MAX_SIDE),
        "fingerprint": lambda value, method: digest(value, "method.fingerprint"),
    }
)
"""Every option of any method, by name."""
