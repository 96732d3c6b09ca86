"""The exact methods: one folder for each, and the table of their names.

A folder holds `spec.py` (options, exact expansion, bound, scalar reference; numpy alone),
`train.py` (the same differentiably, in torch) and, where its factors are drawn on a GPU, `gpu.py`.
The rooms above load the last two by the names that the specification gives; docs/add_a_method.md
makes a method step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilodelta.format.methods.base import Coefficients as Coefficients
    from kilodelta.format.methods.base import Method as Method
    from kilodelta.format.methods.lora.spec import Lora as Lora
    from kilodelta.format.methods.nola.spec import Nola as Nola
    from kilodelta.format.methods.randlora.spec import RandLora as RandLora
    from kilodelta.format.methods.unilora.spec import UniLora as UniLora
    from kilodelta.format.methods.vera.spec import Vera as Vera

TABLE: dict[str, str] = {
    "nola": "kilodelta.format.methods.nola.spec:Nola",
    "randlora": "kilodelta.format.methods.randlora.spec:RandLora",
    "lora": "kilodelta.format.methods.lora.spec:Lora",
    "vera": "kilodelta.format.methods.vera.spec:Vera",
    "unilora": "kilodelta.format.methods.unilora.spec:UniLora",
}
"""Every method by its name in the manifest; the class is imported when it is first asked for."""


def load_part(reference: str) -> Any:
    """Import what `package.module:attribute` names.

    Example:
        >>> load_part("kilodelta.format.methods.nola.spec:Nola").name
        'nola'
    """
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


class _Methods(Mapping[str, "type[Method]"]):
    """The methods' classes by name."""

    def __getitem__(self, name: str) -> type[Method]:
        kind: type[Method] = load_part(TABLE[name])
        return kind

    def __iter__(self) -> Iterator[str]:
        return iter(TABLE)

    def __len__(self) -> int:
        return len(TABLE)


METHODS: Mapping[str, type[Method]] = _Methods()


def register(reference: str) -> type[Method]:
    """Add a method that lives outside of this package, and return its class.

    Files of such a method are read only where it is registered.

    Args:
        reference: `package.module:Class` of a subclass of `Method`.

    Raises:
        InputError: its name or one of its Philox roles belongs to another method.
    """
    from kilodelta.errors import InputError
    from kilodelta.format.foreign import COMPAT

    kind: type[Method] = load_part(reference)
    if kind.name in COMPAT or TABLE.get(kind.name, reference) != reference:
        raise InputError(f"there is a method {kind.name!r} already", fix="choose another name")
    for other in METHODS.values():
        if other.name != kind.name and set(other.roles) & set(kind.roles):
            taken = sorted(role for method in METHODS.values() for role in method.roles)
            raise InputError(
                f"Philox roles {kind.roles} of {kind.name} overlap those of {other.name}",
                fix=f"choose roles that no method has; taken are {taken}",
            )
    TABLE[kind.name] = reference
    return kind


def __getattr__(name: str) -> Any:
    if name in ("Coefficients", "Method"):
        return load_part(f"kilodelta.format.methods.base:{name}")
    for reference in TABLE.values():
        if reference.partition(":")[2] == name:
            return load_part(reference)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
