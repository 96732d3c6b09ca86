"""Read and write tensors, checkpoints and their identity; write results in full or not at all.

Nothing here knows what a delta is, and nothing needs torch. Files may come from strangers: they are
opened as regular files only and never through links (`plain`), read by position (`source`) and
within limits, and checked field by field (`canonical`, `untrusted`). Results take their names only
when they are whole (`staging`).

- One tensor: `dtypes`, `floats`, `tensor`, `tying`
- One file: `safetensors`, `npz`
- One model: `checkpoint`, `identity`, `model_digest`, `digest_cache`, `baseline`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.files.checkpoint import Checkpoint as Checkpoint
    from kilodelta.files.dtypes import DTYPES as DTYPES
    from kilodelta.files.dtypes import FLOATS as FLOATS
    from kilodelta.files.identity import Identity as Identity
    from kilodelta.files.model_digest import digest as digest
    from kilodelta.files.tensor import RawTensor as RawTensor
    from kilodelta.files.tensor import TensorInfo as TensorInfo

_WHERE = {
    "Checkpoint": "kilodelta.files.checkpoint",
    "DTYPES": "kilodelta.files.dtypes",
    "FLOATS": "kilodelta.files.dtypes",
    "Identity": "kilodelta.files.identity",
    "RawTensor": "kilodelta.files.tensor",
    "TensorInfo": "kilodelta.files.tensor",
    "digest": "kilodelta.files.model_digest",
}

__all__ = ["DTYPES", "FLOATS", "Checkpoint", "Identity", "RawTensor", "TensorInfo", "digest"]

# Loaded when first used: to stage a text needs no numpy.
__getattr__, __dir__ = lazy(__name__, _WHERE)
