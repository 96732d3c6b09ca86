"""The `.kd` file as bytes: safetensors in one canonical spelling, with a digest over all of it.

docs/format.md, section 2. `kilodelta.format.file` makes a `Delta` of what is read here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from kilodelta.errors import FileError, InputError
from kilodelta.files import identity, staging
from kilodelta.files.checkpoint import in_name_order
from kilodelta.files.safetensors import encode, header_bytes, read_layout, wide_first
from kilodelta.files.source import SourceFile
from kilodelta.files.tensor import Bytes, RawTensor
from kilodelta.format import manifest as manifests
from kilodelta.format.manifest import Manifest
from kilodelta.format.packing import groups_size
from kilodelta.format.targets import Target
from kilodelta.kinds import kind_of_folder

HEADER_LIMIT = 1 << 20
MANIFEST, DIGEST = "kilodelta", "kilodelta.digest"
COEFFICIENTS, EXTRA, PROBE = "coefficients", "extra.", "probe."

Tensors = Mapping[str, RawTensor]
"""By their names in the file: `coefficients`, `extra.<name>`, `probe.<name>`."""


def named(blob: Bytes, extras: Tensors, probes: Tensors) -> dict[str, RawTensor]:
    """Give the parts of a delta their names in the file."""
    return {
        COEFFICIENTS: RawTensor(dtype="U8", shape=(blob.size,), data=blob),
        **{EXTRA + name: tensor for name, tensor in extras.items()},
        **{PROBE + name: tensor for name, tensor in probes.items()},
    }


def without_prefix(tensors: Tensors, prefix: str) -> dict[str, RawTensor]:
    """Return the tensors whose names begin with a prefix, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def write(path: Path, manifest: Manifest, tensors: Tensors) -> int:
    """Write a file, in full or not at all; return its bytes.

    Raises:
        InputError: the header outgrows 1 MiB.
        OutputError: it cannot be written there.
    """
    header, data = _encode(manifest, tensors)
    if len(header) - 8 > HEADER_LIMIT:
        raise InputError(
            f"the header takes {len(header) - 8} bytes; the format allows {HEADER_LIMIT}",
            fix="use fewer target patterns or fewer extras",
        )
    staging.write(path, header, *data)
    return len(header) + sum(part.nbytes for part in data)


def size(manifest: Manifest, tensors: Tensors) -> int:
    """Return the bytes that `write` would write."""
    header, data = _encode(manifest, tensors)
    return len(header) + sum(part.nbytes for part in data)


def _encode(manifest: Manifest, tensors: Tensors) -> tuple[bytes, list[memoryview]]:
    text = manifest.text()
    return encode(tensors, {MANIFEST: text, DIGEST: _digest(text, tensors)})


def _digest(text: str, tensors: Tensors) -> str:
    """Compute SHA-256 of the manifest and the root of all the file's tensors."""
    root = identity.of_digests(
        {name: identity.raw_digest(name, tensor) for name, tensor in tensors.items()}
    ).root
    state = hashlib.sha256(text.encode("utf-8") + b"\0" + root.encode("ascii"))
    return "sha256:" + state.hexdigest()


def read(path: Path) -> tuple[Manifest, dict[str, RawTensor]]:
    """Read a file and check every rule that needs no base.

    Returns:
        The manifest, and all tensors by their names in the file.

    Raises:
        FileError: the file breaks a rule, or a bit of it has changed.
    """
    if path.is_dir():
        raise _folder(path)
    source = SourceFile(path, error=FileError)
    layout = read_layout(source, limit=HEADER_LIMIT)
    if MANIFEST not in layout.metadata:
        raise FileError(
            f"{path}: its metadata has not exactly the keys {MANIFEST!r} and {DIGEST!r}: it is a "
            "safetensors file, no .kd file",
            fix=f"of a model: kilodelta digest {path}, or kilodelta compress to make a .kd file",
        )
    if set(layout.metadata) != {MANIFEST, DIGEST}:
        raise _fault(path, f"its metadata has not exactly the keys {MANIFEST!r} and {DIGEST!r}")
    tensors = {
        entry.name: RawTensor(
            dtype=entry.dtype,
            shape=entry.shape,
            data=source.read(entry.begin, entry.nbytes),
        )
        for entry in layout.entries
    }
    if header_bytes(wide_first(layout.entries), layout.metadata)[8:] != layout.header:
        raise _fault(path, "its header is not in canonical form")
    text = layout.metadata[MANIFEST]
    if _digest(text, tensors) != layout.metadata[DIGEST]:
        raise _fault(path, "its content does not match its digest")
    manifest = manifests.parse(text)
    _check_tensors(path, manifest, tensors)
    return manifest, tensors


def _folder(path: Path) -> FileError:
    """Say what a folder is that stands where a `.kd` file is wanted."""
    try:
        kind = kind_of_folder(path)
        files = sorted(entry.name for entry in path.iterdir())
    except OSError as problem:
        return FileError(f"{path} cannot be read: {problem.strerror}", fix="check the path")
    own = [name for name in files if name.endswith(".kd")]
    if kind is not None:
        return FileError(f"{path} is {kind.what}", fix=kind.fix)
    if any(name.endswith(".safetensors") for name in files):
        return FileError(
            f"{path} is the folder of a model, no .kd file",
            fix=f"of a model: kilodelta digest {path}; a .kd file stands behind its BASE",
        )
    fix = f"give {path / own[0]}" if len(own) == 1 else "give the .kd file itself"
    return FileError(f"{path} is a folder, no .kd file", fix=fix)


def _fault(path: Path, what: str) -> FileError:
    return FileError(
        f"{path}: {what}", fix="the file is damaged or not written by kilodelta: fetch it again"
    )


def _check_tensors(path: Path, manifest: Manifest, tensors: Tensors) -> None:
    """Check that the tensors are those that the manifest implies."""
    blob = tensors.get(COEFFICIENTS)
    if blob is None or blob.dtype != "U8" or len(blob.shape) != 1:
        raise _fault(path, "it has no one-dimensional U8 tensor 'coefficients'")
    unknown = [n for n in tensors if n != COEFFICIENTS and not n.startswith((EXTRA, PROBE))]
    if unknown:
        raise _fault(path, f"it holds an unknown tensor {min(unknown)!r:.80}")
    extras = without_prefix(tensors, EXTRA)
    if in_name_order(extras) != manifest.extras:
        wrong = sorted(set(extras) ^ set(manifest.extras))
        raise _fault(path, f"the manifest and the tensors disagree about extra {wrong[0]!r:.80}")
    _check_counts(path, manifest, blob.data.size)


def _check_counts(path: Path, manifest: Manifest, nbytes: int) -> None:
    """Check the number of scales, and the sizes that no target's shape changes."""
    method = manifest.method
    # Two shapes tell whether the groups' sizes depend on the target's.
    groups, others = method.groups(_square(1)), method.groups(_square(64))
    shared = groups_size(method.shared(), manifest.bits)
    scales = len(method.shared()) + manifest.count * len(groups)
    if manifest.compat is None and len(manifest.scales) != scales:
        raise _fault(path, f"it has {len(manifest.scales)} scales, but its targets need {scales}")
    needed = shared + manifest.count * groups_size(groups, manifest.bits)
    if groups == others and nbytes != needed:
        raise _fault(path, f"it holds {nbytes} bytes of coefficients, not {needed}")
    if nbytes < shared:
        raise _fault(path, f"it holds {nbytes} bytes of coefficients, fewer than {shared}")


def _square(width: int) -> Target:
    return Target(name="", dtype="F32", shape=(width, width), transposed=False, index=0)
