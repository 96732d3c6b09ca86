"""HF PEFT's LoRA: its factors, quantised.

Source: Hu et al., https://arxiv.org/abs/2106.09685; rank-stabilised scaling by Kalajdzievski,
https://arxiv.org/abs/2312.03732. As HF PEFT 0.21 stores and computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kilodelta.compress.adapters.options import Options
from kilodelta.compress.adapters.parsed import Draft
from kilodelta.compress.adapters.peft.folder import Adapter
from kilodelta.compress.adapters.peft.names import ROOT
from kilodelta.compress.adapters.peft.orientation import is_transposed
from kilodelta.compress.adapters.peft.settings import check_settings, rank_of, scaling_of
from kilodelta.compress.adapters.refactorise import Best, Pair, by_singular_values, quantise_product
from kilodelta.compress.adapters.values import floats
from kilodelta.errors import BaseMismatchError, CheckpointError, InputError
from kilodelta.files.tensor import RawTensor
from kilodelta.format.foreign import stored
from kilodelta.format.methods import Lora
from kilodelta.format.quantise import Floats
from kilodelta.merging.build import Recipe


@dataclass(frozen=True, kw_only=True)
class Product:
    """One target's update B A, the scale folded in, as its weight is stored or transposed."""

    pair: Pair
    transposed: bool

    @property
    def rank(self) -> int:
        return int(self.pair[1].shape[0])

    @property
    def update(self) -> Floats:
        """float64 (out, in)."""
        B, A = self.pair
        found: Floats = B @ A
        return found


def read(adapter: Adapter, options: Options) -> Draft:
    """A LoRA adapter as a `lora` delta.

    Raises:
        CheckpointError: a tensor is missing or damaged.
        BaseMismatchError: a shape is not the base's.
        InputError: a setting is refused, or a rank is not the one that the configuration says.
    """
    check_settings(adapter)
    products = {name: _product(adapter, path) for path, name in adapter.modules.items()}
    extras = {**_extras(adapter), **_biases(adapter)}
    return draft_of(adapter, options, "PEFT LoRA", products, extras)


def draft_of(
    adapter: Adapter,
    options: Options,
    source: str,
    products: Mapping[str, Product],
    extras: Mapping[str, RawTensor],
) -> Draft:
    """The draft of a `lora` delta from products of low rank, with the loss of each."""
    products = {name: _thinned(product) for name, product in products.items()}
    rank = max(product.rank for product in products.values())
    _check_rank(products, rank)
    best = {name: quantise_product(p.pair, rank, options.bits) for name, p in products.items()}
    recipe = Recipe(
        method=Lora(rank=rank),
        patterns=adapter.patterns([name for name, p in products.items() if p.transposed]),
        bits=options.bits,
        name=options.name,
        extras=extras,
    )
    return Draft(
        source=source,
        recipe=recipe,
        own={name: found.groups for name, found in best.items()},
        wanted=lambda name: products[name].update,
        notes=(_worst(best), *_padding(products, rank, options.bits)),
    )


def _thinned(product: Product) -> Product:
    """The same update in no more ranks than its shorter side, which are all that it can have."""
    B, A = product.pair
    if product.rank <= min(B.shape[0], A.shape[1]):
        return product
    return Product(pair=by_singular_values(B, A), transposed=product.transposed)


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
    """The format has one rank a file; what that costs where the adapter has several."""
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


def _product(adapter: Adapter, path: str) -> Product:
    name, start = adapter.modules[path], ROOT + path
    shape = adapter.base.info(name).shape
    rank, scaling = rank_of(adapter, path), scaling_of(adapter, path)
    if f"{start}.lora_embedding_A" in adapter.tensors:
        A = adapter.shaped(f"{start}.lora_embedding_A", (rank, shape[0]))
        B = adapter.shaped(f"{start}.lora_embedding_B", (shape[1], rank))
        return _scaled(A.T, B.T, scaling)
    if len(shape) > 2:
        A = adapter.shaped(f"{start}.lora_A.weight", (rank, *shape[1:]))
        B = adapter.shaped(f"{start}.lora_B.weight", (shape[0], rank, *(1 for _ in shape[2:])))
        return _scaled(B.reshape(-1, rank), A.reshape(rank, -1), scaling)
    transposed = is_transposed(adapter, path, "lora_B.weight")
    out, in_ = shape[::-1] if transposed else shape
    A = adapter.shaped(f"{start}.lora_A.weight", (rank, in_))
    B = adapter.shaped(f"{start}.lora_B.weight", (out, rank))
    return _scaled(B, A, scaling, transposed=transposed)


def _scaled(B: Floats, A: Floats, scaling: float, *, transposed: bool = False) -> Product:
    pair = B.astype(np.float64) * scaling, A.astype(np.float64)
    return Product(pair=pair, transposed=transposed)


def _extras(adapter: Adapter) -> dict[str, RawTensor]:
    """What is stored whole and differs from the base. PEFT saves a targeted embedding's own weight
    too, and with `bias` every bias."""
    targets = set(adapter.modules.values())
    found = {name: e for name, e in adapter.extras.items() if not _is_base(adapter, name, e)}
    for name in found:
        if name in targets:
            raise BaseMismatchError(
                f"the adapter holds its own {name} {found[name].shape}, which is not the base's",
                fix="give the base that it was trained on, with the same vocabulary",
            )
    return found


def _is_base(adapter: Adapter, name: str, tensor: RawTensor) -> bool:
    if name not in adapter.base or adapter.base.info(name).shape != tensor.shape:
        return False
    key = next(key for key, at in adapter.whole.items() if at == name)
    info = adapter.base.info(name)
    if info.dtype == tensor.dtype:
        return bool(np.array_equal(adapter.base.data(name), tensor.data))
    try:
        return bool(np.array_equal(floats(adapter.base, name), adapter.floats(key)))
    except CheckpointError:  # not both are floats
        return False


def _biases(adapter: Adapter) -> dict[str, RawTensor]:
    """`lora_bias`: what lora_B adds to its layer's own bias."""
    found = {}
    for path, weight in adapter.modules.items():
        key, name = f"{ROOT}{path}.lora_B.bias", weight.removesuffix("weight") + "bias"
        if key not in adapter.tensors:
            continue
        if name not in adapter.base:
            raise InputError(
                f"{key} is a bias, and the base has no {name} to add it to",
                fix="train without lora_bias, or give the layer a bias of zeros in the base",
            )
        before, added = floats(adapter.base, name), adapter.floats(key)
        if added.any():
            whole = before + np.float32(scaling_of(adapter, path)) * added
            found[name] = _like_base(adapter, name, whole)
    return found


def _like_base(adapter: Adapter, name: str, values: Floats) -> RawTensor:
    """A tensor in the base's own type."""
    dtype = adapter.base.info(name).dtype
    return RawTensor(dtype=dtype, shape=values.shape, data=stored.pack(values, dtype))
