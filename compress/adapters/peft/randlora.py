"""HF PEFT's RandLora into its compatibility form: the basis named, rebuilt and fingerprinted.

Source: Albert et al., https://arxiv.org/abs/2502.00987, as HF PEFT 0.21 stores it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kilodelta.compress.adapters.peft.config import CONFIG
from kilodelta.compress.adapters.peft.folder import Adapter
from kilodelta.compress.adapters.peft.orientation import is_transposed
from kilodelta.compress.adapters.peft.sites import AdapterSite
from kilodelta.compress.adapters.peft.ties import settle_ties
from kilodelta.compress.adapters.peft.whole import read_whole
from kilodelta.compress.adapters.reader import ParsedAdapter, ReadOptions
from kilodelta.errors import CheckpointError, InputError
from kilodelta.files.dtypes import FLOATS, TARGETS
from kilodelta.format.foreign import PeftRandLora
from kilodelta.format.foreign.peft_randlora import Basis, ceil_div, digest, draw, sides
from kilodelta.format.quantise import Floats
from kilodelta.merging.build import Recipe, targets

PARTS = ("randlora_A", "randlora_B")
NARROW = ("bfloat16", "float16")
KEY_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class _Projection:
    """A basis, and how a file says it."""

    kind: Any
    dtype: Any
    basis: Basis


def read(adapter: Adapter, options: ReadOptions) -> ParsedAdapter:
    """Parse a RandLora adapter as the compatibility form `peft-randlora`.

    Raises:
        InputError: a tensor has another shape than rank and base imply, or nobody says in which
            type the basis was drawn.
        CheckpointError: a tensor is missing, or the copies of the basis differ.
    """
    sites = adapter.matrices()
    whole = read_whole(adapter)
    settled = settle_ties(adapter, {site.name for site in sites.values()}, whole.tensors)
    transposed = [name for name, site in sites.items() if is_transposed(adapter, site)]
    patterns = adapter.patterns(list(sites), transposed)
    layout = targets(adapter.base, patterns)
    shapes = {target.name: target.matrix for target in layout}
    # the coefficients' shapes prove the rank before a basis of that rank is drawn
    own = {name: _coefficients(adapter, sites[name], shape) for name, shape in shapes.items()}
    projection = _projection(adapter, sides(layout), options)
    form = _form(adapter, projection)
    is_stored = projection.kind == "stored"
    return ParsedAdapter(
        source="PEFT RandLora",
        recipe=Recipe(
            method=form,
            patterns=patterns,
            seed=_key(adapter),
            bits=options.float_bits,
            name=options.name,
            extras=settled.extras,
            config={**whole.config, **settled.config},
        ),
        coefficients=own,
        shared=dict(zip("AB", projection.basis, strict=True)) if is_stored else {},
        update=lambda name: update(form, own[name], projection.basis, shapes[name]),
        notes=(_note(projection), *whole.notes),
    )


def update(
    form: PeftRandLora, q: dict[str, Floats], basis: Basis, shape: tuple[int, int]
) -> Floats:
    """Compute PEFT's `get_delta_weight`, float64 (out, in).

    Args:
        form: rank, alpha and basis of the adapter.
        q: `lambda` (n, r) and `gamma` (n, min(out, in)).
        basis: A (r, m) and B (M, n, r), shared by all layers and cut to this one.
        shape: (out, in).
    """
    A, B = (part.astype(np.float64) for part in basis)
    n, small = q["gamma"].shape
    L = q["lambda"].astype(np.float64)[:, :, None] * A[:, None, :small] * q["gamma"]
    product = B[: max(shape), :n].reshape(max(shape), -1) @ L.reshape(-1, small)
    change: Floats = form.scaling * (product.T if shape[0] < shape[1] else product)
    return change


def _note(projection: _Projection) -> str:
    if projection.kind == "stored":
        return "the adapter's basis is not one that PEFT draws: it is stored whole"
    return f"{projection.kind} basis drawn in {projection.dtype}, rebuilt from its key, not stored"


def _form(adapter: Adapter, projection: _Projection) -> PeftRandLora:
    A, B = projection.basis
    return PeftRandLora(
        rank=adapter.rank,
        alpha=adapter.option("randlora_alpha", (int, float)),
        basis=projection.kind,
        dtype=projection.dtype,
        small=A.shape[1],
        large=B.shape[0],
        fingerprint=digest(projection.basis, projection.dtype),
    )


def _key(adapter: Adapter) -> int:
    key: int = adapter.option("projection_prng_key", int, 0)
    return key & KEY_MASK


def _coefficients(adapter: Adapter, site: AdapterSite, shape: tuple[int, int]) -> dict[str, Floats]:
    rank, small = adapter.rank, min(shape)
    n = ceil_div(small, rank)
    return {
        "lambda": adapter.shaped(site.module.key("randlora_lambda"), (rank, n)),
        "gamma": adapter.shaped(site.module.key("randlora_gamma"), (n, small)),
    }


def _projection(adapter: Adapter, needed: tuple[int, int], options: ReadOptions) -> _Projection:
    kind = "dense"
    if adapter.option("very_sparse", bool, False):
        kind = "very-sparse"
    elif adapter.option("sparse", bool, False):
        kind = "sparse"
    saved = _saved(adapter, needed)
    candidates: tuple[str, ...] = ("float32",) if kind != "dense" else NARROW
    if saved is not None:
        return _recognised(adapter, kind, candidates, saved)
    if kind == "dense" and options.basis_dtype is None:
        raise InputError(
            f"{adapter.path} does not hold its basis, and nothing says in which type PEFT drew it",
            fix="add --basis-dtype bfloat16 (CPUs, and GPUs since Ampere), or float16 (older GPUs)",
        )
    dtype = str(options.basis_dtype) if kind == "dense" else "float32"
    return _Projection(
        kind=kind, dtype=dtype, basis=draw(kind, dtype, _key(adapter), adapter.rank, *needed)
    )


def _recognised(
    adapter: Adapter, kind: str, candidates: tuple[str, ...], saved: _Projection
) -> _Projection:
    """Return the recipe that rebuilds a saved basis bit for bit; else the basis itself."""
    A, B = saved.basis
    for dtype in candidates:
        drawn = draw(kind, dtype, _key(adapter), adapter.rank, A.shape[1], B.shape[0])
        if all(map(np.array_equal, drawn, saved.basis)):
            return _Projection(kind=kind, dtype=dtype, basis=drawn)
    return saved


def _saved(adapter: Adapter, needed: tuple[int, int]) -> _Projection | None:
    """Return the basis that the adapter holds, once for all modules or in every one."""
    places = (adapter.keys.shared, *(module.parts for module in adapter.keys.modules))
    keys = [[parts[part] for parts in places if part in parts] for part in PARTS]
    if not any(keys):
        if adapter.option("save_projection", bool, True):
            raise CheckpointError(
                f"{adapter.path} says save_projection, but holds no {PARTS[0]}",
                fix=f"fetch it again; if the basis was left out on purpose, say so in {CONFIG}",
            )
        return None
    for part, names in zip(PARTS, keys, strict=True):
        _require_same(adapter, part, names)
    rank, n = adapter.rank, ceil_div(needed[0], adapter.rank)
    A = adapter.shaped(keys[0][0], (rank, 1, needed[0]))[:, 0]
    B = adapter.shaped(keys[1][0], (needed[1], n, rank))
    dtype = adapter.tensors.info(keys[0][0]).dtype
    if dtype not in TARGETS:
        raise InputError(
            f"{adapter.path}: the basis {keys[0][0]} is stored as {dtype}",
            fix="save it in float32, float16 or bfloat16",
        )
    return _Projection(kind="stored", dtype=FLOATS[dtype].long, basis=(A, B))


def _require_same(adapter: Adapter, part: str, names: list[str]) -> None:
    if not names:
        raise CheckpointError(f"{adapter.path} has no {part}", fix="fetch the adapter again")
    first = adapter.tensors.raw(names[0])
    for name in names[1:]:
        if not np.array_equal(adapter.tensors.raw(name).data, first.data):
            raise CheckpointError(
                f"{adapter.path}: {name} differs from {names[0]}, of which it is a copy",
                fix="the file is damaged: fetch the adapter again",
            )
