"""The `.kd` file: a safetensors file with one canonical spelling and a digest over all of it.

docs/format.md, section 2.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kilodelta.errors import FileError, InputError
from kilodelta.files import identity, staging
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.safetensors import encode, header_bytes, map_file, read_layout, wide_first
from kilodelta.files.tensor import RawTensor
from kilodelta.format import manifest as manifests
from kilodelta.format.coefficients import groups_size
from kilodelta.format.delta import Delta
from kilodelta.format.manifest import Manifest
from kilodelta.format.targets import Target

HEADER_LIMIT = 1 << 20
MANIFEST, DIGEST = "kilodelta", "kilodelta.digest"
COEFFICIENTS, EXTRA, PROBE = "coefficients", "extra.", "probe."


def write(delta: Delta, path: Path) -> int:
    """Write a delta, in full or not at all; returns the bytes written.

    Raises:
        InputError: the header outgrows 1 MiB.
        OutputError: it cannot be written there.
    """
    header, data = _encode(delta)
    if len(header) - 8 > HEADER_LIMIT:
        raise InputError(
            f"the header takes {len(header) - 8} bytes; the format allows {HEADER_LIMIT}",
            fix="use fewer target patterns or fewer extras",
        )
    staging.write(path, header, *data)
    return len(header) + sum(part.nbytes for part in data)


def size(delta: Delta) -> int:
    """The bytes that `write` would write."""
    header, data = _encode(delta)
    return len(header) + sum(part.nbytes for part in data)


def _encode(delta: Delta) -> tuple[bytes, list[memoryview]]:
    tensors = _tensors(delta)
    text = delta.manifest.text()
    metadata = {MANIFEST: text, DIGEST: _digest(text, tensors)}
    return encode(tensors, metadata)


def _tensors(delta: Delta) -> dict[str, RawTensor]:
    blob = RawTensor(dtype="U8", shape=(delta.blob.size,), data=delta.blob)
    extras = {EXTRA + name: tensor for name, tensor in delta.extras.items()}
    probes = {PROBE + name: tensor for name, tensor in delta.probes.items()}
    return {COEFFICIENTS: blob, **extras, **probes}


def _digest(text: str, tensors: Mapping[str, RawTensor]) -> str:
    """Over the manifest and the root of all the file's tensors."""
    root = identity.of_digests(
        {name: identity.raw_digest(name, tensor) for name, tensor in tensors.items()}
    ).root
    state = hashlib.sha256(text.encode("utf-8") + b"\0" + root.encode("ascii"))
    return "sha256:" + state.hexdigest()


def load(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | Checkpoint | None = None
) -> Delta:
    """Read a `.kd` file and check every rule of the format; `base` binds it to its model.

    Raises:
        FileError: the file breaks a rule, or a bit of it has changed.
        BaseMismatchError: the targets do not fit `base`.
    """
    delta = _read(Path(path))
    return delta if base is None else delta.bind(base)


def _fault(path: Path, what: str) -> FileError:
    return FileError(
        f"{path}: {what}", fix="the file is damaged or not written by kilodelta: fetch it again"
    )


def _read(path: Path) -> Delta:
    data = map_file(path, FileError)
    layout = read_layout(data, path, limit=HEADER_LIMIT, error=FileError)
    if set(layout.metadata) != {MANIFEST, DIGEST}:
        raise _fault(path, f"its metadata has not exactly the keys {MANIFEST!r} and {DIGEST!r}")
    found = {
        entry.name: RawTensor(
            dtype=entry.dtype,
            shape=entry.shape,
            data=np.frombuffer(data, np.uint8, entry.nbytes, entry.begin),
        )
        for entry in layout.entries
    }
    if header_bytes(wide_first(layout.entries), layout.metadata)[8:] != layout.header:
        raise _fault(path, "its header is not in canonical form")
    text = layout.metadata[MANIFEST]
    if _digest(text, found) != layout.metadata[DIGEST]:
        raise _fault(path, "its content does not match its digest")
    return _assemble(path, manifests.parse(text), found)


def _assemble(path: Path, manifest: Manifest, found: Mapping[str, RawTensor]) -> Delta:
    blob = found.get(COEFFICIENTS)
    if blob is None or blob.dtype != "U8" or len(blob.shape) != 1:
        raise _fault(path, "it has no one-dimensional U8 tensor 'coefficients'")
    extras, probes = _named(found, EXTRA), _named(found, PROBE)
    if len(found) != 1 + len(extras) + len(probes):
        known = {COEFFICIENTS, *(EXTRA + n for n in extras), *(PROBE + n for n in probes)}
        raise _fault(path, f"it holds an unknown tensor {min(set(found) - known)!r:.80}")
    if in_name_order(extras) != manifest.extras:
        wrong = sorted(set(extras) ^ set(manifest.extras))
        raise _fault(path, f"the manifest and the tensors disagree about extra {wrong[0]!r:.80}")
    _check_counts(path, manifest, blob.data.size)
    return Delta(manifest=manifest, blob=blob.data, extras=extras, probes=probes)


def _named(found: Mapping[str, RawTensor], prefix: str) -> dict[str, RawTensor]:
    return {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}


def _check_counts(path: Path, manifest: Manifest, size: int) -> None:
    """What can be checked without the base: the scales, and sizes that no shape changes."""
    method = manifest.method
    groups, others = method.groups(_dummy(1)), method.groups(_dummy(64))
    shared = groups_size(method.shared(), manifest.bits)
    scales = len(method.shared()) + manifest.count * len(groups)
    if manifest.compat is None and len(manifest.scales) != scales:
        raise _fault(path, f"it has {len(manifest.scales)} scales, but its targets need {scales}")
    needed = shared + manifest.count * groups_size(groups, manifest.bits)
    if groups == others and size != needed:
        raise _fault(path, f"it holds {size} bytes of coefficients, not {needed}")
    if size < shared:
        raise _fault(path, f"it holds {size} bytes of coefficients, fewer than {shared}")


def _dummy(width: int) -> Target:
    return Target(name="", dtype="F32", shape=(width, width), transposed=False, index=0)
