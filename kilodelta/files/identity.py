"""The identity of a model: one SHA-256 root over its tensors, however they lie in files.

`tensor digest = H(name 0x00 dtype 0x00 shape 0x00 bytes)`, `root = H(digests in name order)`
(docs/format.md, section 4). `kilodelta.files.model_digest` computes it from files and memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kilodelta.files.checkpoint import in_name_order
from kilodelta.files.tensor import RawTensor


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A model's root and its tensors' digests in name order, each `sha256:<hex>`."""

    root: str
    tensors: Mapping[str, str]


class Hash(Protocol):
    """A hash that is being computed: one of hashlib's, or of `kilodelta.exact.sha256`."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


def tensor_hash(
    name: str, dtype: str, shape: tuple[int, ...], new: Callable[[bytes], Hash] = hashlib.sha256
) -> Hash:
    """Start a SHA-256 with a tensor's name, dtype and shape; its bytes are to follow.

    Args:
        name, dtype, shape: of the tensor.
        new: starts a SHA-256.
    """
    # Zero bytes between the parts: no name, dtype or shape holds one, so no two tensors collide.
    decimals = ",".join(map(str, shape))
    return new(b"\0".join((name.encode(), dtype.encode(), decimals.encode(), b"")))


def tensor_digest(name: str, dtype: str, shape: tuple[int, ...], data: Any) -> str:
    """Compute the digest of one tensor.

    Args:
        name: its name.
        dtype: its safetensors name, such as `F32`.
        shape: its shape.
        data: any buffer of its raw little-endian bytes.

    Example:
        >>> tensor_digest("w", "U8", (2,), b"\\x01\\x02")[:23]
        'sha256:f1b05f0e81620c2e'
    """
    state = tensor_hash(name, dtype, shape)
    state.update(data)
    return "sha256:" + state.hexdigest()


def raw_digest(name: str, tensor: RawTensor) -> str:
    """Compute the digest of one tensor in memory under a name."""
    return tensor_digest(name, tensor.dtype, tensor.shape, tensor.data)


def root(digests: Iterable[str]) -> str:
    """Compute the root over tensor digests that already stand in name order."""
    state = hashlib.sha256()
    for text in digests:
        state.update(bytes.fromhex(text.removeprefix("sha256:")))
    return "sha256:" + state.hexdigest()


def of_digests(tensors: Mapping[str, str]) -> Identity:
    """Make the identity of a model from its tensors' digests by name, in any order."""
    ordered = {name: tensors[name] for name in in_name_order(tensors)}
    return Identity(root=root(ordered.values()), tensors=ordered)


def fingerprints(identity: Identity) -> bytes:
    """Return two bytes per tensor, in name order: the first byte of SHA-256(name), then of the
    tensor digest."""
    return b"".join(
        hashlib.sha256(name.encode("utf-8")).digest()[:1] + bytes.fromhex(digest[7:9])
        for name, digest in identity.tensors.items()
    )
