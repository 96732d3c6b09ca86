"""Expand a delta into the inputs of a graph that takes low-rank factors: a switch of fine-tunes.

The integer factors come from the exact kernels. Each entry is then rounded once to the graph's
dtype, after a power of two was moved from one factor to the other, so that both have entries of
like size and float16 neither overflows nor underflows sooner than it must. In float32 a factor
below 2^24 is exact. What follows, x A B + x W, is the graph's floating-point arithmetic: outputs
agree with the merged model's to rounding, not bit for bit; zeros give the base's exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta import parallel
from kilodelta.errors import InputError
from kilodelta.export.adapter.fit import fit, too_high
from kilodelta.export.adapter.layout import AdapterLayout, Use
from kilodelta.export.merge.tensor import rounded
from kilodelta.export.peft.factors import float_factors, scales
from kilodelta.files.dtypes import PRECISIONS, TARGETS
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.merging import stacks as together
from kilodelta.progress import Meter, Progress, silent

Matrix = npt.NDArray[Any]
Factors = dict[str, Matrix]
"""Arrays by input name. Those of a bfloat16 graph are float32: numpy lacks the type, so whoever
feeds them rounds them, as `kilodelta.files.dtypes.FloatType.narrow` does."""


def base_factors(layout: AdapterLayout) -> Factors:
    """Return the inputs of the base itself: zeros, and the values that stored tensors start from.

    Args:
        layout: of the graph that the inputs are for.

    Returns:
        Arrays by input name, in the layout's shapes; with slots, every slot is the base.
    """
    made = _zeros(layout, layout.lead)
    for name, tensor in layout.defaults.items():
        value = _stored_value(name, tensor, layout)
        made[name] = np.broadcast_to(value, (*layout.lead, *value.shape)).copy()
    return made


def _zeros(layout: AdapterLayout, lead: tuple[int, ...]) -> Factors:
    dtype, axes = PRECISIONS[layout.dtype].numpy, len(layout.lead)
    return {name: np.zeros((*lead, *shape[axes:]), dtype) for name, shape in layout.inputs.items()}


def expand(
    delta: Delta,
    layout: AdapterLayout,
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> Factors:
    """Compute a delta's inputs for a graph, without the axis of slots.

    Args:
        delta: needs no base: the layout says what its targets are.
        layout: of the graph that the inputs are for.
        threads: cores to use; all by default.
        progress: called with how far the work is, in tensors.

    Returns:
        Arrays by input name: the factors of its targets, zeros for other exposed tensors, and the
        stored tensors that it brings, or their defaults.

    Raises:
        BaseMismatchError: the graph was made of another base.
        InputError: the graph cannot take this delta (`kilodelta.export.adapter.fit`).
        ExportError: a stored tensor does not fit into the graph's dtype.
        FileError: the coefficients break the exactness bound.
    """
    bound = fit(delta, layout)
    exposed = {t.info.name: t for t in layout.exposed if t.use != "unused"}
    made = _zeros(layout, ())
    names = [name for name, target in bound.targets.items() if target.tensor in exposed]
    meter = Meter("expand", len(names), "tensors", progress)
    for name, (left, right) in _float_factors(bound, names, meter, threads).items():
        if left.shape[1] > layout.rank:  # a compatibility form of a fused layer adds its ranks up
            raise too_high(left.shape[1], layout)
        target = bound.targets[name]
        tensor = exposed[target.tensor]
        A, B = (made[port] for port in tensor.names)
        stored = (right.T, left.T) if target.transposed else (left, right)
        if target.part is not None:
            _fill(A[target.part], B[target.part], "straight", *stored)
        else:
            _fill(A, B, tensor.use, *stored)
    for name, default in layout.defaults.items():
        made[name] = _stored_value(name, bound.extras.get(name, default), layout)
    return made


def _stored_value(name: str, tensor: RawTensor, layout: AdapterLayout) -> Matrix:
    """Round a stored tensor once, as the graph takes it."""
    if tensor.dtype not in TARGETS:
        return tensor.values()
    dtype = PRECISIONS[layout.dtype]
    values = dtype.widen(rounded(name, tensor, dtype.name))
    return values.astype(dtype.numpy).reshape(tensor.shape)


def in_slots(layout: AdapterLayout, fine_tunes: Sequence[Factors]) -> Factors:
    """Stack the inputs of a graph with slots: the base as number 0, then fine-tunes in order.

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


def _float_factors(
    delta: Delta, names: Sequence[str], meter: Meter, threads: int | None
) -> dict[str, tuple[Matrix, Matrix]]:
    """Compute (out, K) and (K, in) of each target, float64, of like size."""
    if not names:
        return {}
    if delta.manifest.compat is not None:

        def factors(name: str) -> tuple[Matrix, Matrix]:
            pair = float_factors(delta, name)
            meter.add(1)
            return pair

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
    scaled: tuple[dict[str, Matrix], dict[str, Matrix]] = ({}, {})
    place = {name: index for index, name in enumerate(names)}
    for stack in stacks:
        side = 0 if stack.is_left else 1
        share = np.expand_dims(shares[side][[place[n] for n in stack.names]], 1 + side)
        scaled[side].update(zip(stack.names, stack.values * share, strict=True))
    meter.add(len(names))
    return {name: (scaled[0][name], scaled[1][name]) for name in names}


def _tops(stack: together.Stack) -> dict[str, Matrix]:
    """Return the largest magnitude of each component, by target."""
    tops = np.abs(stack.values).max(axis=1 if stack.is_left else 2)
    return dict(zip(stack.names, tops, strict=True))


def _fill(A: Matrix, B: Matrix, use: Use, rows: Matrix, columns: Matrix) -> None:
    """Write a target's two inputs from its update as stored, (rows, k) @ (k, columns).

    Each entry is rounded once; components beyond k stay zero.
    """
    k = rows.shape[1]
    if use == "turned":
        A[:, :k], B[:k] = columns.T, rows.T
    elif use == "straight":
        A[:, :k], B[:k] = rows, columns
    else:
        A[:k] = columns.reshape(k, *A.shape[1:])
        B[:, :k] = rows.reshape(*rows.shape, *B.shape[2:])
