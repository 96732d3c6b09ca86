"""HF PEFT's Uni-LoRA into its compatibility form: one vector, and the seed that deals it out.

Source: Li et al., https://arxiv.org/abs/2506.00799, as HF PEFT 0.21 stores it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.compress.adapters.options import Options
from kilodelta.compress.adapters.parsed import Draft
from kilodelta.compress.adapters.peft.folder import Adapter
from kilodelta.compress.adapters.peft.names import ROOT
from kilodelta.compress.adapters.peft.orientation import is_conv1d_like
from kilodelta.errors import InputError
from kilodelta.files.dtypes import FLOATS
from kilodelta.format.foreign.peft_unilora import PeftUniLora, deal, digest, places, scales_of
from kilodelta.format.quantise import Floats
from kilodelta.merging.build import Recipe, targets

THETA = "base_model.unilora_theta_d"
Indices = npt.NDArray[Any]
Shape = tuple[int, int]


def read(adapter: Adapter, options: Options) -> Draft:
    """The compatibility form `peft-unilora` of an adapter.

    Raises:
        InputError: a shape does not fit, or saved indices are not what the seed deals out.
        CheckpointError: a tensor is missing.
    """
    turned = [name for name in adapter.modules.values() if is_conv1d_like(adapter, name)]
    patterns = adapter.patterns(sorted(turned))
    shapes = {target.name: target.matrix for target in targets(adapter.base, patterns)}
    seed, bases = adapter.option("proj_seed", int, 42), adapter.option("theta_d_length", int, 256)
    if seed < 0 or bases < 1:
        raise InputError(
            f"{adapter.path}: proj_seed {seed} and theta_d_length {bases} make no sense",
            fix="give the configuration that PEFT wrote beside the adapter",
        )
    theta = adapter.shaped(THETA, (bases,))
    indices = deal(seed, bases, places(adapter.rank, list(shapes.values())))
    starts = _starts(adapter, indices, shapes)
    dtype = _scale_type(adapter, options)
    form = PeftUniLora(
        rank=adapter.rank,
        bases=bases,
        total=indices.size,
        dtype=dtype,
        fingerprint=digest(indices),
    )
    scaled = theta.astype(np.float64) * scales_of(indices, bases, dtype)
    return Draft(
        source="PEFT Uni-LoRA",
        recipe=Recipe(
            method=form,
            patterns=patterns,
            seed=seed,
            bits=32 if options.dtype == "float32" else 16,
            name=options.name,
            extras=adapter.extras,
        ),
        own={name: {"start": np.array([start])} for name, start in starts.items()},
        shared={"theta": theta},
        wanted=lambda name: update(scaled, indices[starts[name] :], adapter.rank, shapes[name]),
        notes=(f"the vector is dealt out by NumPy's shuffle, and scaled in {dtype}",),
    )


def update(scaled: Floats, indices: Indices, rank: int, shape: Shape) -> Floats:
    """PEFT's `get_delta_weight`, float64 (out, in)."""
    middle = rank * shape[1]
    A = scaled[indices[:middle]].reshape(rank, shape[1])
    B = scaled[indices[middle : middle + rank * shape[0]]].reshape(shape[0], rank)
    found: Floats = B @ A
    return found


def _starts(adapter: Adapter, indices: Indices, shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Where each target's places begin: in the model's order, or where its saved indices are."""
    saved = {
        name: adapter.tensors.data(f"{ROOT}{path}.unilora_indices_A").view("<i8")
        for path, name in adapter.modules.items()
        if f"{ROOT}{path}.unilora_indices_A" in adapter.tensors
    }
    order = list(adapter.modules.values())
    if saved:
        order = _order(adapter, indices, saved, shapes)
    ends = np.cumsum([places(adapter.rank, [shapes[name]]) for name in order])
    return dict(zip(order, [0, *map(int, ends[:-1])], strict=True))


def _order(
    adapter: Adapter, indices: Indices, saved: Mapping[str, Indices], shapes: Mapping[str, Shape]
) -> list[str]:
    """The order in which the seed deals out the indices that were saved."""
    order: list[str] = []
    start, left = 0, dict(saved)
    while left:
        found = _next(indices[start:], left)
        if found is None:
            name = min(left)
            raise InputError(
                f"the indices saved for {name} are not those that the adapter's seed deals out",
                fix="it was made by another version of PEFT: merge it there, and compress",
            )
        order.append(found)
        start += places(adapter.rank, [shapes[found]])
        del left[found]
    return order


def _next(indices: Indices, left: Mapping[str, Indices]) -> str | None:
    return next(
        (name for name, part in left.items() if np.array_equal(indices[: part.size], part)), None
    )


def _scale_type(adapter: Adapter, options: Options) -> Any:
    """The type of PEFT's scales: that of the saved ones, else as told, else the base's."""
    named: Sequence[str] = [n for n in adapter.tensors.names if n.endswith("unilora_scales_A")]
    if not named and options.basis_dtype is not None:
        return options.basis_dtype
    name = next(iter(adapter.modules.values()))
    found = adapter.tensors.info(named[0]).dtype if named else adapter.base.info(name).dtype
    return FLOATS[found].long
