"""HF PEFT's VeRA into its compatibility form: two vectors a layer, the basis named.

Source: Kopiczko et al., https://arxiv.org/abs/2310.11454, as HF PEFT 0.21 stores it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kilodelta.compress.adapters.options import Options
from kilodelta.compress.adapters.parsed import Draft
from kilodelta.compress.adapters.peft.folder import CONFIG, Adapter
from kilodelta.compress.adapters.peft.names import ROOT
from kilodelta.compress.adapters.peft.orientation import transposed_names
from kilodelta.errors import CheckpointError
from kilodelta.format.foreign.peft_vera import Basis, PeftVera, digest, draw
from kilodelta.format.quantise import Floats
from kilodelta.format.targets import Target
from kilodelta.merging.build import Recipe, targets

KEYS = ("base_model.vera_A", "base_model.vera_B")
KEY_MASK = (1 << 64) - 1


def read(adapter: Adapter, options: Options) -> Draft:
    """The compatibility form `peft-vera` of an adapter.

    Raises:
        InputError: a tensor has another shape than rank and base imply.
        CheckpointError: a tensor is missing.
    """
    patterns = adapter.patterns(transposed_names(adapter, "vera_lambda_b"))
    layout = targets(adapter.base, patterns)
    seed = adapter.option("projection_prng_key", int, 0) & KEY_MASK
    height, width = (max(target.matrix[axis] for target in layout) for axis in (0, 1))
    drawn = draw(seed, adapter.rank, height, width)
    basis, kind = drawn, "drawn"
    if _is_saved(adapter):
        basis = _saved(adapter, height, width)
        kind = "drawn" if all(map(np.array_equal, drawn, basis)) else "stored"
    paths = {name: path for path, name in adapter.modules.items()}
    own = {target.name: _coefficients(adapter, paths[target.name], target) for target in layout}
    form = PeftVera(
        rank=adapter.rank,
        basis="drawn" if kind == "drawn" else "stored",
        height=height,
        width=width,
        fingerprint=digest(basis),
    )
    recipe = Recipe(
        method=form,
        patterns=patterns,
        seed=seed,
        bits=32 if options.dtype == "float32" else 16,
        name=options.name,
        extras=adapter.extras,
    )
    shapes = {target.name: target.matrix for target in layout}
    return Draft(
        source="PEFT VeRA",
        recipe=recipe,
        own=own,
        shared=dict(zip("AB", basis, strict=True)) if kind == "stored" else {},
        wanted=lambda name: update(own[name], basis, shapes[name][1]),
        notes=(_NOTES[kind],),
    )


_NOTES: Mapping[str, str] = {
    "drawn": "the basis is rebuilt from its key, not stored",
    "stored": "the adapter's basis is not the one that its key draws: it is stored whole",
}


def update(q: Mapping[str, Floats], basis: Basis, in_: int) -> Floats:
    """PEFT's `get_delta_weight`, float64 (out, in)."""
    A, B = (part.astype(np.float64) for part in basis)
    found: Floats = (q["b"].astype(np.float64)[:, None] * B[: len(q["b"])]) @ (
        q["d"].astype(np.float64)[:, None] * A[:, :in_]
    )
    return found


def _is_saved(adapter: Adapter) -> bool:
    saved = any(key in adapter.tensors for key in KEYS)
    if not saved and adapter.option("save_projection", bool, True):
        raise CheckpointError(
            f"{adapter.path} says save_projection, but holds no {KEYS[0]}",
            fix=f"fetch it again; if the basis was left out on purpose, say so in {CONFIG}",
        )
    return saved


def _saved(adapter: Adapter, height: int, width: int) -> Basis:
    A = adapter.shaped(KEYS[0], (adapter.rank, width))
    return A, adapter.shaped(KEYS[1], (height, adapter.rank))


def _coefficients(adapter: Adapter, path: str, target: Target) -> dict[str, Floats]:
    key = f"{ROOT}{path}.vera_lambda_"
    return {
        "d": adapter.shaped(key + "d", (adapter.rank,)),
        "b": adapter.shaped(key + "b", (target.matrix[0],)),
    }
