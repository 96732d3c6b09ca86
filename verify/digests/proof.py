"""Prove by digests: the base is the one named, the file is whole, the result as promised."""

from __future__ import annotations

import os
from collections.abc import Mapping

from kilodelta.errors import ProofError
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.files import identity
from kilodelta.files.baseline import require_base
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.identity import Identity
from kilodelta.files.model_digest import digest
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.merging.proof import target_digests
from kilodelta.progress import Progress, silent
from kilodelta.verify.digests.grid_proof import prove_grid
from kilodelta.verify.digests.result import SHOWN
from kilodelta.verify.digests.result import Proof as Proof


def prove(
    base: str | os.PathLike[str] | Checkpoint,
    delta: str | os.PathLike[str] | Delta,
    merged: str | os.PathLike[str] | Checkpoint | None = None,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> Proof:
    """Prove base, file and result, reading every byte; no remembered digest is trusted.

    The targets are computed again and their root is compared with the file's. A merged model must
    hold exactly these targets, the file's extras, and the base's other tensors.

    Args:
        base: a folder, a `.safetensors` file or an opened checkpoint.
        delta: a `.kd` file, or one that is loaded.
        merged: a merged model to prove as well.
        threads: for hashing and merging; all cores by default.
        progress: called as tensors are read.

    Raises:
        BaseMismatchError: the base is another model.
        FileError: the file is damaged.
        ProofError: the result, or the merged model, differs; names the tensors.
        SelfTestError: this machine's kernels compute wrongly.

    Example:
        >>> proof = prove("tests/golden/0.1.0/base.safetensors", "tests/golden/0.1.0/nola-8.kd")
        >>> proof.targets, proof.result.partition(":")[0]
        (4, 'sha256')
    """
    require_good_kernels()
    loaded = delta if isinstance(delta, Delta) else load(delta)
    if loaded.manifest.grid is not None:
        return prove_grid(base, loaded, merged, threads=threads, progress=progress)
    checkpoint = Checkpoint.open(base)
    identified = require_base(checkpoint, loaded.manifest.base, threads=threads, progress=progress)
    bound = loaded.bind(checkpoint)
    targets = target_digests(bound, checkpoint, threads=threads, progress=progress)
    root = identity.root(targets.values())
    if root != bound.manifest.result:
        raise ProofError(
            f"the merged targets have root {root}, the file says {bound.manifest.result}",
            fix="the file is damaged, or its maker's machine computed wrongly: fetch it again",
        )
    other = ""
    if merged is not None:
        other = _compare(merged, expected(identified, bound, targets), threads, progress)
    return Proof(
        base=identified.root,
        result=root,
        targets=len(bound.targets),
        extras=len(bound.extras),
        merged=other,
    )


def expected(base: Identity, delta: Delta, targets: Mapping[str, str]) -> Identity:
    """Return the identity that the merged model must have.

    Args:
        base: the base's.
        delta: bound to the base.
        targets: by name, the digests of the merged targets.
    """
    extras = {
        name: identity.tensor_digest(name, tensor.dtype, tensor.shape, tensor.data)
        for name, tensor in delta.extras.items()
    }
    return identity.of_digests({**base.tensors, **targets, **extras})


def _compare(
    merged: str | os.PathLike[str] | Checkpoint,
    wanted: Identity,
    threads: int | None,
    progress: Progress,
) -> str:
    actual = digest(merged, threads=threads, progress=progress)
    if actual.root != wanted.root:
        place = merged.path if isinstance(merged, Checkpoint) else merged
        raise ProofError(
            f"{place} is not this base with this file merged\n{_differences(actual, wanted)}",
            fix="merge again: kilodelta merge BASE FILE -o NEW",
        )
    return actual.root


def _differences(actual: Identity, wanted: Identity) -> str:
    ours, theirs = actual.tensors, wanted.tensors
    lines = [f"  extra: {name}" for name in ours if name not in theirs]
    lines += [f"  missing: {name}" for name in theirs if name not in ours]
    lines += [
        f"  changed: {name}\n    expected {theirs[name]}\n    found    {text}"
        for name, text in ours.items()
        if theirs.get(name, text) != text
    ]
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join(lines[:SHOWN] + more)
