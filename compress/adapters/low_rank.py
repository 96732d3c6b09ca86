"""Products of low rank into a `lora` delta, with what each loses when it is quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from kilodelta.compress.adapters.reader import ParsedAdapter
from kilodelta.compress.adapters.refactorise import Best, Pair, by_singular_values, quantise_product
from kilodelta.errors import InputError
from kilodelta.format.methods import Lora
from kilodelta.format.quantise import Floats
from kilodelta.merging.build import Recipe


@dataclass(frozen=True, kw_only=True)
class Product:
    """One target's update B A, its scale folded into B: (out, r) and (r, in), float64."""

    pair: Pair
    transposed: bool = False
    """Whether the weight is stored (in, out)."""

    @property
    def rank(self) -> int:
        return int(self.pair[1].shape[0])

    @property
    def update(self) -> Floats:
        """The product, float64 (out, in)."""
        B, A = self.pair
        found: Floats = B @ A
        return found

    def equals(self, other: Product) -> bool:
        """Return whether two updates have the same factors."""
        pairs = zip(self.pair, other.pair, strict=True)
        return all(a.shape == b.shape and np.array_equal(a, b) for a, b in pairs)


def low_rank_adapter(
    source: str, products: Mapping[str, Product], recipe: Recipe, notes: tuple[str, ...] = ()
) -> ParsedAdapter:
    """Quantise products into a `lora` delta of the largest rank among them.

    Args:
        source: what the adapter was, for the report.
        products: by the base's tensors.
        recipe: patterns, bits, name and extras; its method is replaced by the one of that rank.
        notes: what the reader has to say.

    Raises:
        InputError: a target is too small for the rank of another one, or cannot be exact.
    """
    products = {name: _thinned(product) for name, product in products.items()}
    rank = max(product.rank for product in products.values())
    _check_rank(products, rank)
    best = {n: quantise_product(product.pair, rank, recipe.bits) for n, product in products.items()}
    return ParsedAdapter(
        source=source,
        recipe=replace(recipe, method=Lora(rank=rank)),
        coefficients={name: found.groups for name, found in best.items()},
        update=lambda name: products[name].update,
        notes=(_worst(best), *_padding(products, rank, recipe.bits), *notes),
    )


def _thinned(product: Product) -> Product:
    """Return the same update without ranks that add nothing: those whose row or column is zero, and
    those beyond the matrix's shorter side."""
    B, A = product.pair
    is_used = np.asarray(B.any(axis=0) & A.any(axis=1))
    is_used[0] |= not is_used.any()  # an update of zeros keeps one rank
    B, A = B[:, is_used], A[is_used]
    if len(A) > min(B.shape[0], A.shape[1]):
        B, A = by_singular_values(B, A)
    return replace(product, pair=(B, A))


def _check_rank(products: Mapping[str, Product], rank: int) -> None:
    for name, product in products.items():
        B, A = product.pair
        if rank > max(B.shape[0], A.shape[1]):
            raise InputError(
                f"another target has rank {rank}, which is more than {name} {B.shape[0]} x"
                f" {A.shape[1]} can be given, and a file has one rank",
                fix="import the adapter with fewer targets, or compress the merged model",
            )


def _worst(best: Mapping[str, Best]) -> str:
    loss = {name: found.error / found.norm if found.norm else 0.0 for name, found in best.items()}
    name = max(loss, key=lambda name: loss[name])
    return f"the most is lost in {name}: {loss[name]:.2e} of its update"


def _padding(products: Mapping[str, Product], rank: int, bits: int) -> tuple[str, ...]:
    """Say what it costs that a file has one rank, where the adapter has several."""
    spare = sum(
        (rank - p.rank) * sum(map(max, zip(*(f.shape for f in p.pair), strict=True)))
        for p in products.values()
    )
    if not spare:
        return ()
    return (
        f"ranks differ, and the file has one: {spare * bits // 8} bytes of it are zeros that fill"
        f" them up to {rank}",
    )
