"""HF PEFT's VeRA into its compatibility form: two vectors a layer, the basis named.

Source: Kopiczko et al., https://arxiv.org/abs/2310.11454, as HF PEFT 0.21 stores it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from kilodelta.compress.adapters.peft.config import CONFIG
from kilodelta.compress.adapters.peft.folder import Adapter
from kilodelta.compress.adapters.peft.orientation import is_transposed
from kilodelta.compress.adapters.peft.sites import AdapterSite
from kilodelta.compress.adapters.peft.ties import settle_ties
from kilodelta.compress.adapters.peft.whole import read_whole
from kilodelta.compress.adapters.reader import ParsedAdapter, ReadOptions
from kilodelta.errors import CheckpointError
from kilodelta.format.foreign.peft_vera import Basis, PeftVera, digest, draw
from kilodelta.format.quantise import Floats
from kilodelta.merging.build import Recipe, targets

KEY_MASK = (1 << 64) - 1

_NOTES: Mapping[str, str] = {
    "drawn": "the basis is rebuilt from its key, not stored",
    "stored": "the adapter's basis is not the one that its key draws: it is stored whole",
}


def read(adapter: Adapter, options: ReadOptions) -> ParsedAdapter:
    """Parse a VeRA adapter as the compatibility form `peft-vera`.

    Raises:
        InputError: a tensor has another shape than rank and base imply.
        CheckpointError: a tensor is missing.
    """
    sites = adapter.matrices()
    whole = read_whole(adapter)
    settled = settle_ties(adapter, {site.name for site in sites.values()}, whole.tensors)
    transposed = [name for name, site in sites.items() if _is_transposed(adapter, site)]
    patterns = adapter.patterns(list(sites), transposed)
    layout = targets(adapter.base, patterns)
    shapes = {target.name: target.matrix for target in layout}
    # the vectors' shapes prove the rank before a basis of that rank is drawn
    own = {name: _coefficients(adapter, sites[name], shape[0]) for name, shape in shapes.items()}
    seed = adapter.option("projection_prng_key", int, 0) & KEY_MASK
    height, width = (max(shape[axis] for shape in shapes.values()) for axis in (0, 1))
    drawn = draw(seed, adapter.rank, height, width)
    basis, kind = _saved(adapter, drawn, height, width)
    form = PeftVera(
        rank=adapter.rank,
        basis=kind,
        height=height,
        width=width,
        fingerprint=digest(basis),
    )
    return ParsedAdapter(
        source="PEFT VeRA",
        recipe=Recipe(
            method=form,
            patterns=patterns,
            seed=seed,
            bits=options.float_bits,
            name=options.name,
            extras=settled.extras,
            config={**whole.config, **settled.config},
        ),
        coefficients=own,
        shared=dict(zip("AB", basis, strict=True)) if kind == "stored" else {},
        update=lambda name: update(own[name], basis, shapes[name][1]),
        notes=(_NOTES[kind], *whole.notes),
    )


def update(q: Mapping[str, Floats], basis: Basis, in_: int) -> Floats:
    """Compute PEFT's `get_delta_weight`, float64 (out, in)."""
    A, B = (part.astype(np.float64) for part in basis)
    change: Floats = (q["b"].astype(np.float64)[:, None] * B[: len(q["b"])]) @ (
        q["d"].astype(np.float64)[:, None] * A[:, :in_]
    )
    return change


def _is_transposed(adapter: Adapter, site: AdapterSite) -> bool:
    shape = adapter.tensors.info(site.module.key("vera_lambda_b")).shape
    return is_transposed(adapter, site, *shape[:1])


def _saved(
    adapter: Adapter, drawn: Basis, height: int, width: int
) -> tuple[Basis, Literal["drawn", "stored"]]:
    """Return the basis, and whether its key draws it or the adapter must give it."""
    shared = adapter.keys.shared
    if not shared:
        if adapter.option("save_projection", bool, True):
            raise CheckpointError(
                f"{adapter.path} says save_projection, but holds no base_model.vera_A",
                fix=f"fetch it again; if the basis was left out on purpose, say so in {CONFIG}",
            )
        return drawn, "drawn"
    A = adapter.shaped(shared.get("vera_A", "base_model.vera_A"), (adapter.rank, width))
    B = adapter.shaped(shared.get("vera_B", "base_model.vera_B"), (height, adapter.rank))
    is_drawn = all(map(np.array_equal, drawn, (A, B)))
    return (A, B), "drawn" if is_drawn else "stored"


def _coefficients(adapter: Adapter, site: AdapterSite, out: int) -> dict[str, Floats]:
    return {
        "d": adapter.shaped(site.module.key("vera_lambda_d"), (adapter.rank,)),
        "b": adapter.shaped(site.module.key("vera_lambda_b"), (out,)),
    }
