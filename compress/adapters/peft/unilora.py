"""HF PEFT's Uni-LoRA into its compatibility form: one vector, and the seed that deals it out.

Source: Li et al., https://arxiv.org/abs/2506.00799, as HF PEFT 0.21 stores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.compress.adapters.peft.folder import Adapter
from kilodelta.compress.adapters.peft.orientation import is_transposed
from kilodelta.compress.adapters.peft.sites import AdapterSite
from kilodelta.compress.adapters.peft.ties import settle_ties
from kilodelta.compress.adapters.peft.whole import read_whole
from kilodelta.compress.adapters.reader import ParsedAdapter, ReadOptions
from kilodelta.errors import CheckpointError, InputError
from kilodelta.files.dtypes import FLOATS
from kilodelta.format.foreign.peft_unilora import PeftUniLora, deal, digest, places, scales_of
from kilodelta.format.quantise import Floats
from kilodelta.merging.build import Recipe, targets

THETA = "unilora_theta_d"
Indices = npt.NDArray[Any]
Shape = tuple[int, int]
Sites = Mapping[str, AdapterSite]


def read(adapter: Adapter, options: ReadOptions) -> ParsedAdapter:
    """Parse a Uni-LoRA adapter as the compatibility form `peft-unilora`.

    Raises:
        InputError: a shape does not fit, or saved indices are not what the seed deals out.
        CheckpointError: a tensor is missing.
    """
    sites = adapter.matrices()
    whole = read_whole(adapter)
    settled = settle_ties(adapter, {site.name for site in sites.values()}, whole.tensors)
    transposed = [name for name, site in sites.items() if is_transposed(adapter, site)]
    patterns = adapter.patterns(list(sites), transposed)
    shapes = {target.name: target.matrix for target in targets(adapter.base, patterns)}
    seed, bases = adapter.option("proj_seed", int, 42), adapter.option("theta_d_length", int, 256)
    if seed < 0 or bases < 1:
        raise InputError(
            f"{adapter.path}: proj_seed {seed} and theta_d_length {bases} make no sense",
            fix="give the configuration that PEFT wrote beside the adapter",
        )
    theta = adapter.shaped(adapter.keys.shared.get(THETA, f"base_model.{THETA}"), (bases,))
    _check_rank(adapter, shapes)
    indices = deal(seed, bases, places(adapter.rank, list(shapes.values())))
    starts = _starts(adapter, sites, indices, shapes)
    dtype = _scale_type(adapter, sites, options)
    scales = scales_of(indices, bases, dtype)
    _check_scales(adapter, sites, starts, indices, scales)
    form = PeftUniLora(
        rank=adapter.rank,
        bases=bases,
        total=indices.size,
        dtype=dtype,
        fingerprint=digest(indices),
    )
    scaled = theta.astype(np.float64) * scales
    return ParsedAdapter(
        source="PEFT Uni-LoRA",
        recipe=Recipe(
            method=form,
            patterns=patterns,
            seed=seed,
            bits=options.float_bits,
            name=options.name,
            extras=settled.extras,
            config={**whole.config, **settled.config},
        ),
        coefficients={name: {"start": np.array([start])} for name, start in starts.items()},
        shared={"theta": theta},
        update=lambda name: update(scaled, indices[starts[name] :], adapter.rank, shapes[name]),
        notes=(
            f"the vector is dealt out by NumPy's shuffle, and scaled in {dtype}",
            *whole.notes,
        ),
    )


def update(scaled: Floats, indices: Indices, rank: int, shape: Shape) -> Floats:
    """Compute PEFT's `get_delta_weight`, float64 (out, in).

    Args:
        scaled: the shared vector times each place's norm, float64 (k,).
        indices: places in the vector, A's (r, in) before B's (out, r), flat; more may follow.
        rank: r.
        shape: (out, in).
    """
    middle = rank * shape[1]
    A = scaled[indices[:middle]].reshape(rank, shape[1])
    B = scaled[indices[middle : middle + rank * shape[0]]].reshape(shape[0], rank)
    change: Floats = B @ A
    return change


def _check_rank(adapter: Adapter, shapes: Mapping[str, Shape]) -> None:
    """Refuse a rank that nothing in the file proves and that no layer can have."""
    largest = max(max(shape) for shape in shapes.values())
    if adapter.rank > largest:
        raise InputError(
            f"{adapter.config.where}: r is {adapter.rank}, more than the {largest} of the largest"
            " layer",
            fix="give the configuration that PEFT wrote beside the adapter",
        )


def _indices(adapter: Adapter, site: AdapterSite, shape: Shape) -> Indices:
    """Return a site's saved indices, A's (r, in) before B's (out, r), flat."""
    parts = []
    for side, wanted in (("A", (adapter.rank, shape[1])), ("B", (shape[0], adapter.rank))):
        key = site.module.key(f"unilora_indices_{side}")
        raw = adapter.tensors.raw(key)
        if (raw.dtype, raw.shape) != ("I64", wanted):
            raise CheckpointError(
                f"{adapter.path}: tensor {key} is {raw.dtype} {raw.shape}, not I64 {wanted}",
                fix="save the adapter again",
            )
        parts.append(raw.values().reshape(-1))
    return np.concatenate(parts)


def _starts(
    adapter: Adapter, sites: Sites, indices: Indices, shapes: Mapping[str, Shape]
) -> dict[str, int]:
    """Find where each target's places begin: by the model's order, or by its saved indices."""
    saved = {
        name: _indices(adapter, site, shapes[name])
        for name, site in sites.items()
        if "unilora_indices_A" in site.module.parts
    }
    order = list(sites)
    if saved:
        order = _order(adapter, indices, saved, shapes)
    if len(order) != len(sites):
        name = min(sites.keys() - set(order))
        raise CheckpointError(
            f"{adapter.path} holds indices for some layers, but none for {name}",
            fix="save the adapter again",
        )
    ends = np.cumsum([places(adapter.rank, [shapes[name]]) for name in order])
    return dict(zip(order, [0, *map(int, ends[:-1])], strict=True))


def _order(
    adapter: Adapter, indices: Indices, saved: Mapping[str, Indices], shapes: Mapping[str, Shape]
) -> list[str]:
    """Find the order in which the seed deals out the indices that were saved."""
    order: list[str] = []
    start, left = 0, dict(saved)
    while left:
        following = _next(indices[start:], left)
        if following is None:
            name = min(left)
            raise InputError(
                f"the indices saved for {name} are not those that the adapter's seed deals out",
                fix="it was made by another version of PEFT: merge it there, and compress",
            )
        order.append(following)
        start += places(adapter.rank, [shapes[following]])
        del left[following]
    return order


def _next(indices: Indices, left: Mapping[str, Indices]) -> str | None:
    return next(
        (name for name, part in left.items() if np.array_equal(indices[: part.size], part)), None
    )


def _scale_type(adapter: Adapter, sites: Sites, options: ReadOptions) -> Any:
    """Return the type of PEFT's scales: of the saved ones, else the option's, else the base's."""
    keys = [s.module.parts.get("unilora_scales_A") for s in sites.values()]
    saved = next(filter(None, keys), None)
    if saved is None and options.basis_dtype is not None:
        return options.basis_dtype
    name = next(iter(sites))
    dtype = adapter.tensors.info(saved).dtype if saved else adapter.base.info(name).dtype
    if dtype not in FLOATS:
        raise CheckpointError(
            f"{adapter.path}: tensor {saved} is {dtype}, not a float type",
            fix="save the adapter again",
        )
    return FLOATS[dtype].long


def _check_scales(
    adapter: Adapter,
    sites: Sites,
    starts: Mapping[str, int],
    indices: Indices,
    scales: Floats,
) -> None:
    """See that saved scales are those of the vector's places."""
    for name, site in sites.items():
        at = starts[name]
        for side in "AB":
            key = site.module.parts.get(f"unilora_scales_{side}")
            if key is None:
                continue
            found = adapter.floats(key).reshape(-1)
            if not np.array_equal(found, scales[indices[at : at + found.size]]):
                raise InputError(
                    f"the scales {key} are not those that the adapter's seed deals out",
                    fix="it was made by another version of PEFT: merge it there, and compress",
                )
            at += found.size
