"""A delta as the inputs of a graph that takes its low-rank factors: what a device does to switch.

The integer factors come from the exact kernels. Each entry is then rounded once to the graph's
dtype, after a power of two was moved from one factor to the other, so that both have entries of
like size and float16 neither overflows nor underflows sooner than it must. In float32 a factor
below 2^24 is exact. What follows, x A B + x W, is the graph's floating-point arithmetic: outputs
agree with the merged model's to rounding, not bit for bit; zeros give the base's exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta import parallel
from kilodelta.errors import BaseMismatchError, InputError
from kilodelta.export.adapter.layout import AdapterLayout, Exposed
from kilodelta.export.peft.factors import float_factors, scales
from kilodelta.files.tensor import TensorInfo
from kilodelta.format.delta import Delta
from kilodelta.format.targets import Target, select
from kilodelta.merging import stacks as together
from kilodelta.progress import Meter, Progress, silent

Matrix = npt.NDArray[Any]
Factors = dict[str, Matrix]
"""Arrays by input name. Those of a bfloat16 graph are float32: numpy lacks the type, so whoever
feeds them rounds them, as `kilodelta.files.dtypes.FloatType.narrow` does."""

_DTYPES: Mapping[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.float32,
}


def base_factors(layout: AdapterLayout) -> Factors:
    """The factors of the base itself: zeros."""
    dtype = _DTYPES[layout.dtype]
    return {name: np.zeros(shape, dtype) for name, shape in layout.inputs.items()}


def expand(
    delta: Delta,
    layout: AdapterLayout,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> Factors:
    """A delta's factors by input name, without the axis of slots; what it leaves alone is zero.

    Args:
        delta: needs no base: the layout says what its targets are.
        layout: of the graph that the factors are for.
        threads: cores to use; all by default.

    Raises:
        BaseMismatchError: the graph was made of another base.
        InputError: the graph cannot take this delta: its method is of full rank, its rank is
            higher than the graph's, it stores tensors whole, or it changes what is not exposed.
        FileError: the coefficients break the exactness bound.
    """
    bound = fit(delta, layout)
    exposed = {t.info.name: t for t in layout.exposed if t.use != "unused"}
    made = base_factors(replace(layout, slots=0))
    names = [name for name in bound.targets if name in exposed]
    meter = Meter("expand", len(names), "tensors", progress)
    for name, (left, right) in _float_factors(bound, names, meter, threads).items():
        if left.shape[1] > layout.rank:  # a compatibility form of a fused layer: a rank a part
            raise _too_high(left.shape[1], layout)
        A, B = (made[port] for port in exposed[name].names)
        stored = (right.T, left.T) if bound.targets[name].transposed else (left, right)
        _fill(A, B, exposed[name], *stored)
    return made


def fit(delta: Delta, layout: AdapterLayout) -> Delta:
    """The delta bound to a graph's base, if the graph can take it.

    Raises:
        BaseMismatchError, InputError, FileError: as `expand` does.
    """
    base = delta.manifest.base
    if base.root != layout.base_root:
        raise BaseMismatchError(
            f"the graph was made of the base {layout.base_root} ({layout.base_name or 'unnamed'}); "
            f"the file is for {base.root} ({base.name or 'unnamed'})",
            fix="give a file made for the graph's base, or export the graph from the file's",
        )
    _require_low_rank(delta, layout)
    _require_no_extras(delta)
    exposed = [tensor.info for tensor in layout.exposed]
    layout_there = _require_exposed(delta, exposed)
    return delta if delta.layout == layout_there else delta.bind_to(exposed)


def in_slots(layout: AdapterLayout, fine_tunes: Sequence[Factors]) -> Factors:
    """The inputs of a graph with slots: the base as number 0, then the fine-tunes in order.

    Raises:
        InputError: there are more of them than slots.
    """
    if len(fine_tunes) > layout.slots:
        raise InputError(
            f"{len(fine_tunes)} fine-tunes do not fit into {layout.slots} slots",
            fix="export the graph with more slots, or run the others in a batch of their own",
        )
    stacked = base_factors(layout)
    for slot, factors in enumerate(fine_tunes, 1):
        put_slot(stacked, slot, factors)
    return stacked


def put_slot(stacked: Factors, slot: int, factors: Factors) -> None:
    """Put a fine-tune into a slot, in place."""
    for name, values in factors.items():
        stacked[name][slot] = values


def _require_low_rank(delta: Delta, layout: AdapterLayout) -> None:
    form = delta.form
    if form.full_rank:
        raise InputError(
            f"a {form.name} update has full rank; the graph takes low-rank factors",
            fix="apply the file in patch or refit mode, or merge it",
        )
    if form.rank > layout.rank:
        raise _too_high(form.rank, layout)


def _too_high(rank: int, layout: AdapterLayout) -> InputError:
    return InputError(
        f"the file has rank {rank}, the graph takes up to {layout.rank}",
        fix=f"make the graph anew, for a device by kilodelta bundle --rank {rank}, else by "
        f"export-adapter --rank {rank}; or merge the file",
    )


def _require_no_extras(delta: Delta) -> None:
    if delta.extras:
        raise InputError(
            f"the file also stores tensors whole, which are no inputs of the graph: "
            f"{', '.join(delta.extras)}",
            fix="apply the file in patch or refit mode, or make it without extras",
        )


def _require_exposed(delta: Delta, exposed: list[TensorInfo]) -> tuple[Target, ...]:
    """The targets. Exposed tensors are tensors of the base, so as many matches as the file has
    targets are these very targets."""
    matched = select(exposed, delta.manifest.patterns)
    if len(matched) != delta.manifest.count:
        raise InputError(
            f"the graph exposes {len(matched)} of the {delta.manifest.count} tensors that the file "
            f"changes: {', '.join(delta.manifest.patterns.include)}",
            fix="export the graph with all of them exposed, or apply in patch or refit mode",
        )
    return matched


def _float_factors(
    delta: Delta, names: Sequence[str], meter: Meter, threads: int | None
) -> dict[str, tuple[Matrix, Matrix]]:
    """(out, K) and (K, in) of each target, float64, of like size."""
    if not names:
        return {}
    if delta.manifest.compat is not None:

        def factors(name: str) -> tuple[Matrix, Matrix]:
            found = float_factors(delta, name)
            meter.add(1)
            return found

        weight = {name: sum(delta.targets[name].matrix) for name in names}
        pairs = parallel.run(factors, names, meter, weight=weight.__getitem__, threads=threads)
        return dict(zip(names, pairs, strict=True))
    stacks = together.stacks(delta, names, threads=threads)
    left = {n: v for s in stacks if s.is_left for n, v in _tops(s).items()}
    right = {n: v for s in stacks if not s.is_left for n, v in _tops(s).items()}
    c, e = (np.array(numbers) for numbers in zip(*map(delta.scale, names), strict=True))
    shares = scales(
        np.stack([left[name] for name in names]),
        np.stack([right[name] for name in names]),
        c[:, None].astype(np.float64),
        e[:, None],
    )
    found: tuple[dict[str, Matrix], dict[str, Matrix]] = ({}, {})
    place = {name: index for index, name in enumerate(names)}
    for stack in stacks:
        side = 0 if stack.is_left else 1
        share = np.expand_dims(shares[side][[place[n] for n in stack.names]], 1 + side)
        found[side].update(zip(stack.names, stack.values * share, strict=True))
    meter.add(len(names))
    return {name: (found[0][name], found[1][name]) for name in names}


def _tops(stack: together.Stack) -> dict[str, Matrix]:
    """The largest magnitude of each component, by target."""
    tops = np.abs(stack.values).max(axis=1 if stack.is_left else 2)
    return dict(zip(stack.names, tops, strict=True))


def _fill(A: Matrix, B: Matrix, tensor: Exposed, rows: Matrix, columns: Matrix) -> None:
    """Write a target's two inputs from its update as stored, (rows, k) @ (k, columns), rounding
    once; components that there are not stay zero."""
    k = rows.shape[1]
    if tensor.use == "turned":
        A[:, :k], B[:k] = columns.T, rows.T
    elif tensor.use == "straight":
        A[:, :k], B[:k] = rows, columns
    else:
        A[:k] = columns.reshape(k, *A.shape[1:])
        B[:, :k] = rows.reshape(*rows.shape, *B.shape[2:])
