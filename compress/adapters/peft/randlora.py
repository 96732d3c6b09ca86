"""HF PEFT's RandLora into its compatibility form: the basis named, rebuilt and fingerprinted.

Source: Albert et al., https://arxiv.org/abs/2502.00987, as HF PEFT 0.21 stores it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kilodelta.compress.adapters.options import Options
from kilodelta.compress.adapters.parsed import Draft
from kilodelta.compress.adapters.peft.folder import CONFIG, Adapter
from kilodelta.compress.adapters.peft.names import ROOT
from kilodelta.errors import CheckpointError, InputError
from kilodelta.files.dtypes import FLOATS, TARGETS
from kilodelta.format.foreign import PeftRandLora
from kilodelta.format.foreign.peft_randlora import Basis, ceil_div, digest, draw, sides
from kilodelta.format.quantise import Floats
from kilodelta.format.targets import Target
from kilodelta.merging.build import Recipe, targets
from kilodelta.models.layer_names import is_conv1d, read_config

PARTS = ("randlora_A", "randlora_B")
NARROW = ("bfloat16", "float16")
KEY_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A basis, and how a file says it."""

    kind: Any
    dtype: Any
    basis: Basis


def read(adapter: Adapter, options: Options) -> Draft:
    """The compatibility form `peft-randlora` of an adapter.

    Raises:
        InputError: a tensor has another shape than rank and base imply, or nobody says in which
            type the basis was drawn.
        CheckpointError: a tensor is missing, or the copies of the basis differ.
    """
    patterns = adapter.patterns(_transposed(adapter))
    layout = targets(adapter.base, patterns)
    found = _basis(adapter, sides(layout), options)
    paths = {name: path for path, name in adapter.modules.items()}
    own = {target.name: _coefficients(adapter, paths[target.name], target) for target in layout}
    form = _form(adapter, found)
    recipe = Recipe(
        method=form,
        patterns=patterns,
        seed=_key(adapter),
        bits=32 if options.dtype == "float32" else 16,
        name=options.name,
        extras=adapter.extras,
    )
    shapes = {target.name: target.matrix for target in layout}
    return Draft(
        source="PEFT RandLora",
        recipe=recipe,
        own=own,
        shared=dict(zip("AB", found.basis, strict=True)) if found.kind == "stored" else {},
        wanted=lambda name: update(form, own[name], found.basis, shapes[name]),
        notes=_notes(found),
    )


def _transposed(adapter: Adapter) -> list[str]:
    """By the model's kind where its configuration lies beside it, for PEFT's flag is one for all
    layers; by the flag elsewhere."""
    flag = adapter.option("fan_in_fan_out", bool, False)
    config, names = read_config(adapter.base), sorted(adapter.modules.values())
    return [name for name in names if (is_conv1d(name, config) if config else flag)]


def _notes(found: _Found) -> tuple[str, ...]:
    if found.kind == "stored":
        return ("the adapter's basis is not one that PEFT draws: it is stored whole",)
    return (f"{found.kind} basis drawn in {found.dtype}, rebuilt from its key, not stored",)


def _form(adapter: Adapter, found: _Found) -> PeftRandLora:
    A, B = found.basis
    return PeftRandLora(
        rank=adapter.rank,
        alpha=adapter.option("randlora_alpha", (int, float)),
        basis=found.kind,
        dtype=found.dtype,
        small=A.shape[1],
        large=B.shape[0],
        fingerprint=digest(found.basis, found.dtype),
    )


def _key(adapter: Adapter) -> int:
    key: int = adapter.option("projection_prng_key", int, 0)
    return key & KEY_MASK


def _coefficients(adapter: Adapter, path: str, target: Target) -> dict[str, Floats]:
    rank, small = adapter.rank, min(target.matrix)
    n, key = ceil_div(small, rank), f"{ROOT}{path}.randlora_"
    return {
        "lambda": adapter.shaped(key + "lambda", (rank, n)),
        "gamma": adapter.shaped(key + "gamma", (n, small)),
    }


def update(
    form: PeftRandLora, q: dict[str, Floats], basis: Basis, shape: tuple[int, int]
) -> Floats:
    """PEFT's `get_delta_weight`, float64 (out, in)."""
    A, B = (part.astype(np.float64) for part in basis)
    n, small = q["gamma"].shape
    L = q["lambda"].astype(np.float64)[:, :, None] * A[:, None, :small] * q["gamma"]
    product = B[: max(shape), :n].reshape(max(shape), -1) @ L.reshape(-1, small)
    found: Floats = form.scaling * (product.T if shape[0] < shape[1] else product)
    return found


def _basis(adapter: Adapter, needed: tuple[int, int], options: Options) -> _Found:
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
    return _Found(
        kind=kind, dtype=dtype, basis=draw(kind, dtype, _key(adapter), adapter.rank, *needed)
    )


def _recognised(adapter: Adapter, kind: str, candidates: tuple[str, ...], saved: _Found) -> _Found:
    """The recipe that rebuilds a saved basis bit for bit; else the basis itself."""
    A, B = saved.basis
    for dtype in candidates:
        drawn = draw(kind, dtype, _key(adapter), adapter.rank, A.shape[1], B.shape[0])
        if all(map(np.array_equal, drawn, saved.basis)):
            return _Found(kind=kind, dtype=dtype, basis=drawn)
    return saved


def _saved(adapter: Adapter, needed: tuple[int, int]) -> _Found | None:
    """The basis that the adapter holds, every copy of it the same."""
    keys = [[name for name in adapter.tensors.names if name.endswith("." + part)] for part in PARTS]
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
    return _Found(kind="stored", dtype=FLOATS[dtype].long, basis=(A, B))


def _require_same(adapter: Adapter, part: str, names: list[str]) -> None:
    if not names:
        raise CheckpointError(f"{adapter.path} has no {part}", fix="fetch the adapter again")
    first = adapter.tensors.data(names[0])
    for name in names[1:]:
        if not np.array_equal(adapter.tensors.data(name), first):
            raise CheckpointError(
                f"{adapter.path}: {name} differs from {names[0]}, of which it is a copy",
                fix="the file is damaged: fetch the adapter again",
            )
