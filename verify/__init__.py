"""Prove a fine-tune: by digests, and by running every artefact against a float64 reference.

`digests/` reads every byte, `parity/` judges outputs, `runners/` runs one runtime each;
`environment/` says what this machine can run, `gpu/` proves a GPU machine. Names load when first
used, so that digests need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kilodelta.verify.digests.proof import prove as prove
    from kilodelta.verify.options import Options as Options
    from kilodelta.verify.verification import verify as verify

_WHERE = {
    "Options": "kilodelta.verify.options",
    "prove": "kilodelta.verify.digests.proof",
    "verify": "kilodelta.verify.verification",
}

__all__ = [
    "Options",
    "prove",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
