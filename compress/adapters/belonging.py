"""Which options of reading belong to which kind of adapter: one that would do nothing is refused.

A user who gives `--alpha` to a LoRA expects another update than the one that would be written.
"""

from __future__ import annotations

from pathlib import Path

from kilodelta.compress.adapters.foreign_files import refuse_foreign
from kilodelta.compress.adapters.official_nola.checkpoint import is_official_nola
from kilodelta.compress.adapters.peft.config import read_config
from kilodelta.compress.adapters.reader import ReadOptions
from kilodelta.errors import InputError

NOLA = "official NOLA"
_NOT_BITS = "its coefficients stay floats, of --dtype; --requantise makes integers of --bits"
_NOT_DTYPE = "it becomes integers, of --bits"
_NOT_BASIS = "it has no basis whose type is open"
_NOT_NOLA = "that is an option of official NOLA"

_WRONG: dict[str, dict[str, str]] = {
    "LORA": {"dtype": _NOT_DTYPE, "basis_dtype": _NOT_BASIS},
    "RANDLORA": {"bits": _NOT_BITS},
    "UNILORA": {"bits": _NOT_BITS},
    "VERA": {"bits": _NOT_BITS, "basis_dtype": _NOT_BASIS},
    NOLA: {"bits": _NOT_BITS, "basis_dtype": _NOT_BASIS},
}
"""By kind: the options that would do nothing, and why."""
for _kind in ("LORA", "RANDLORA", "UNILORA", "VERA"):
    _WRONG[_kind] |= dict.fromkeys(("alpha", "drawn_on", "factors"), _NOT_NOLA)

_FACTORS = {
    "dtype": "with --factors it becomes integers, of --bits",
    "drawn_on": "--factors hold what the bases were drawn for",
}
"""Of official NOLA that is read by its factors."""


def check_options(path: Path, options: ReadOptions, *, requantise: bool) -> None:
    """Refuse an option that does nothing for the kind of adapter that lies at `path`.

    Args:
        path: the adapter.
        options: how it is to be read.
        requantise: whether integers are made of it in the end, which have `bits`.

    Raises:
        InputError: an option belongs to another kind.
        CheckpointError: the adapter's configuration is missing or damaged.
    """
    refuse_foreign(path)
    kind = NOLA if is_official_nola(path) else read_config(path).values.get("peft_type")
    wrong = dict(_WRONG.get(kind, {}) if isinstance(kind, str) else {})
    if kind == NOLA and options.factors:
        wrong = {"basis_dtype": _NOT_BASIS, **_FACTORS}
    if requantise:
        wrong.pop("bits", None)
    plain = ReadOptions()
    for key, why in wrong.items():
        if getattr(options, key) != getattr(plain, key):
            option = f"--{key.replace('_', '-')}"
            what = kind if kind == NOLA else f"a PEFT adapter of peft_type {kind}"
            raise InputError(
                f"{option} does nothing for {path}, {what}: {why}", fix=f"leave {option} out"
            )
