"""Compute both results of a delta on a quantised base, without writing them.

*In the grid* a weight keeps its steps and takes new codes; *beside* it the exact update stays apart
and the base's bytes are untouched (docs/format.md, section 10).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from kilodelta import parallel
from kilodelta.exact import products
from kilodelta.files.identity import fingerprints, root, tensor_hash
from kilodelta.format.delta import Delta
from kilodelta.format.manifest import Base
from kilodelta.format.manifest import parse as parse_manifest
from kilodelta.format.targets import Target
from kilodelta.grid.identity import matrix_digest
from kilodelta.grid.model import QuantisedModel
from kilodelta.merging import cpu
from kilodelta.merging.in_grid import BAND, regridded
from kilodelta.merging.quantised import grid_of
from kilodelta.merging.tensors import merged_whole
from kilodelta.progress import Meter, Progress, silent

DOMAIN = b"kilodelta update 1"
GRID_FACTS = ("grid_codes_changed", "grid_update_steps")
"""What `made` says of a merge in the grid of a quantised base."""
FINGERPRINTED = 512
"""Tensors up to which the manifest carries two bytes each."""


@dataclass(frozen=True, kw_only=True)
class GridResult:
    """What a delta makes of its quantised base.

    Attributes:
        targets: digests of the merged targets in target order; logical ones in the grid.
        changed, weights: codes that change, of how many.
        steps: the mean magnitude of the update, in steps of the grid.
        still: weights whose step is zero.
    """

    targets: dict[str, str]
    changed: int
    weights: int
    steps: float
    still: int

    @property
    def share(self) -> float:
        """The share of codes that change; 1 where no target is quantised."""
        return self.changed / self.weights if self.weights else 1.0


def grid_result(
    delta: Delta,
    model: QuantisedModel,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> GridResult:
    """Compute the digests of a bound delta's targets, merged in the grid.

    Args:
        delta: bound to `model`.
        model: the quantised base.
        threads: cores to use; all by default.
        progress: receives how far the work is.

    Raises:
        CheckpointError: the base cannot be read, or a plain target holds NaN or infinity.
        ProofError: an update takes a plain weight out of its type's range.
    """
    sizes = {name: sum(map(_size, parts)) for name, parts in delta.tensors.items()}
    meter = Meter("expand", sum(sizes.values()), "weights", progress)

    def one(name: str) -> tuple[str, int, int, float, int]:
        if name not in model.stored:
            return _plain_digest(delta, name, model), 0, 0, 0.0, 0
        base = model.matrix(name)
        new = regridded(delta, delta.target(name), base)
        meter.add(sizes[name])
        weights = base.codes.size
        return matrix_digest(name, new.matrix), new.changed, weights, new.steps, new.still

    done = parallel.run(one, list(sizes), meter, weight=sizes.__getitem__, threads=threads)
    digests, changed, weights, steps, still = zip(*done, strict=True)
    return GridResult(
        targets=dict(zip(delta.tensors, digests, strict=True)),
        changed=sum(changed),
        weights=sum(weights),
        steps=sum(steps) / max(sum(weights), 1),
        still=sum(still),
    )


def _size(target: Target) -> int:
    return target.matrix[0] * target.matrix[1]


def _plain_digest(delta: Delta, name: str, model: QuantisedModel) -> str:
    base = model.plain_raw(name)
    state = tensor_hash(name, base.dtype, base.shape)
    for part in merged_whole(delta, name, base.data, cpu.merged):
        state.update(part.data)
    return "sha256:" + state.hexdigest()


def beside_digests(delta: Delta, *, threads: int | None = None) -> dict[str, str]:
    """Compute the digests of a bound delta's updates, in target order.

    `H("kilodelta update 1" 0x00 name 0x00 "out,in" 0x00 e 0x00 N)`: 2^e N is the update, N int64
    (out, in), row-major and little-endian.

    Args:
        delta: bound to its base, of an exact method.
        threads: cores to use; all by default.
    """
    targets = list(delta.targets.values())
    meter = Meter("updates", sum(_size(target) for target in targets), "weights", silent)
    digests = parallel.run(
        lambda target: _update_digest(delta, target, meter),
        targets,
        meter,
        weight=_size,
        threads=threads,
    )
    return dict(zip(delta.targets, digests, strict=True))


def _update_digest(delta: Delta, target: Target, meter: Meter) -> str:
    c, e = delta.scale(target.name)
    bound = delta.bound(target.name)
    out, in_ = target.stored
    head = (DOMAIN, target.name.encode(), f"{out},{in_}".encode(), str(e).encode(), b"")
    state = hashlib.sha256(b"\0".join(head))
    left, right = cpu.stored_factors(delta, target)
    multiply = products.multiplier(right, bound)
    for span, factors in cpu.bands(left, out, min(out, max(1, BAND // in_)), right.shape[0]):
        numbers = np.asarray(multiply(factors)).astype(np.float64) * c
        state.update(np.ascontiguousarray(numbers.astype("<i8")).data)
        meter.add(len(span) * in_)
    return "sha256:" + state.hexdigest()


def bound_to(
    draft: Delta, model: QuantisedModel, *, threads: int | None = None, progress: Progress = silent
) -> Delta:
    """State a quantised base in a delta's manifest and bind it; the results are left as they are.

    Args:
        draft: an exact delta.
        model: the quantised base.
        threads: cores to use; all by default.
        progress: receives how far the work is.

    Raises:
        BaseMismatchError, InputError, CheckpointError: as `with_results`.
    """
    stored = model.stored_identity(threads=threads, progress=progress)
    grid = grid_of(model.identity(threads=threads, progress=progress))
    base = Base(
        name=draft.manifest.base.name,
        root=stored.root,
        tensors=len(stored.tensors),
        fingerprints=fingerprints(stored) if len(stored.tensors) <= FINGERPRINTED else b"",
    )
    return replace(draft, manifest=replace(draft.manifest, base=base, grid=grid)).bind(model)


def with_results(
    draft: Delta, model: QuantisedModel, *, threads: int | None = None, progress: Progress = silent
) -> tuple[Delta, GridResult]:
    """State a quantised base and both results in a delta's manifest.

    Args:
        draft: an exact delta; what its manifest says of base and results is replaced, but the
            base's name.
        model: the quantised base.
        threads: cores to use; all by default.
        progress: receives how far the work is.

    Returns:
        the delta, bound to the base, and what its merge in the grid changes.

    Raises:
        BaseMismatchError: the targets do not fit the model.
        InputError: the delta is of a compatibility form.
        CheckpointError: the model cannot be read.
    """
    bound = bound_to(draft, model, threads=threads, progress=progress)
    in_grid = grid_result(bound, model, threads=threads, progress=progress)
    manifest = replace(
        bound.manifest,
        result=root(in_grid.targets.values()),
        beside=root(beside_digests(bound, threads=threads).values()),
        made={
            **bound.manifest.made,
            "grid_codes_changed": round(in_grid.share, 6),
            "grid_update_steps": float(f"{in_grid.steps:.3g}"),
        },
    )
    parse_manifest(manifest.text())  # nothing is made that a reader would refuse
    return replace(bound, manifest=manifest), in_grid
