"""Prove a quantised base, both results on it, and a model that was merged in its grid."""

from __future__ import annotations

import os
from collections.abc import Mapping

from kilodelta.errors import ProofError
from kilodelta.export.merge.tensor import merged_tensor
from kilodelta.files import identity
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.format.delta import Delta
from kilodelta.format.grid_names import named_for
from kilodelta.grid.model import QuantisedModel, value_digest
from kilodelta.grid.open import open_quantised
from kilodelta.merging.grid_results import beside_digests, grid_result
from kilodelta.merging.quantised import open_base, require_grid_base
from kilodelta.progress import Progress
from kilodelta.verify.digests.result import SHOWN, Proof

_FETCH = "the file is damaged, or its maker's machine computed wrongly: fetch it again"


def prove_grid(
    base: str | os.PathLike[str] | Checkpoint,
    delta: Delta,
    merged: str | os.PathLike[str] | Checkpoint | None,
    *,
    threads: int | None,
    progress: Progress,
) -> Proof:
    """Prove base, file and both results, reading every byte.

    A merged model may be in another layout than the base: its codes, scales and zero points have
    to be the promised ones, and its other tensors the base's by value.

    Args:
        base: the quantised base, in any layout.
        delta: a file that was made for it.
        merged: a model merged in the grid, to prove as well.
        threads: for hashing and merging; None for all cores.
        progress: called as weights are read.

    Raises:
        BaseMismatchError: the base is another model.
        ProofError: a result, or the merged model, differs; names the weights.
    """
    model = open_base(base, delta.manifest)
    stored = require_grid_base(model, delta.manifest, threads=threads, progress=progress)
    bound = delta.bind(model)
    result = grid_result(bound, model, threads=threads, progress=progress)
    root = identity.root(result.targets.values())
    beside = identity.root(beside_digests(bound, threads=threads).values())
    for what, found, wanted in (
        ("targets, merged in the grid,", root, delta.manifest.result),
        ("updates beside the base", beside, delta.manifest.beside),
    ):
        if found != wanted:
            raise ProofError(f"the {what} have root {found}, the file says {wanted}", fix=_FETCH)
    other = ""
    if merged is not None:
        other_model = named_for(open_quantised(merged), delta.manifest)
        other = _prove_merged(other_model, model, bound, result.targets, threads)
    return Proof(
        base=stored.root,
        result=root,
        targets=len(bound.targets),
        extras=len(bound.extras),
        merged=other,
    )


def _prove_merged(
    merged: QuantisedModel,
    base: QuantisedModel,
    delta: Delta,
    targets: Mapping[str, str],
    threads: int | None,
) -> str:
    """Compare a merged model with what it must be; return its logical root."""
    in_grid = {name: targets[name] for name in delta.grid_targets}
    found = merged.identity(threads=threads)
    wanted = {**base.identity(threads=threads).weights, **in_grid}
    plain = {name: value_digest(name, base.plain_raw(name)) for name in base.plain}
    for name in (*delta.extras, *(n for n in delta.tensors if n not in in_grid)):
        new = merged_tensor(delta, name, lambda n: base.plain_raw(n).data)
        plain[name] = value_digest(name, new)
    ours = {name: value_digest(name, merged.plain_raw(name)) for name in merged.plain}
    lines = _differences(dict(found.weights), wanted)
    if merged.method != "onnx" or base.method == "onnx":  # a graph names its others itself
        lines += _differences(ours, plain)
    if lines:
        more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        listed = "\n".join(lines[:SHOWN] + more)
        raise ProofError(
            f"{merged.path} is not this base with this file merged in the grid\n{listed}",
            fix="merge again: kilodelta merge BASE FILE -o NEW",
        )
    return found.root


def _differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    lines = []
    for name in in_name_order({*ours, *theirs}):
        if name not in theirs:
            lines.append(f"  extra: {name}")
        elif name not in ours:
            lines.append(f"  missing: {name}")
        elif ours[name] != theirs[name]:
            lines.append(f"  changed: {name}")
    return lines
