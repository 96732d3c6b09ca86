"""HF PEFT's LoRA: its factors, quantised.

Source: Hu et al., https://arxiv.org/abs/2106.09685; rank-stabilised scaling by Kalajdzievski,
https://arxiv.org/abs/2312.03732. As HF PEFT 0.21 stores and computes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from kilodelta.compress.adapters.low_rank import Product, low_rank_adapter
from kilodelta.compress.adapters.peft.folder import Adapter
from kilodelta.compress.adapters.peft.orientation import is_transposed
from kilodelta.compress.adapters.peft.settings import rank_of, scaling_of
from kilodelta.compress.adapters.peft.sites import AdapterSite
from kilodelta.compress.adapters.peft.ties import settle_ties
from kilodelta.compress.adapters.peft.whole import read_whole
from kilodelta.compress.adapters.reader import ParsedAdapter, ReadOptions
from kilodelta.compress.adapters.tensors import floats
from kilodelta.errors import InputError
from kilodelta.files.dtypes import FLOATS
from kilodelta.files.tensor import RawTensor
from kilodelta.format.foreign import stored
from kilodelta.format.methods import Lora
from kilodelta.format.quantise import Floats
from kilodelta.merging.build import Recipe

A_KEY, B_KEY, BIAS_KEY = "lora_A.weight", "lora_B.weight", "lora_B.bias"
TABLE_KEYS = "lora_embedding_A", "lora_embedding_B"


def read(adapter: Adapter, options: ReadOptions) -> ParsedAdapter:
    """Parse a LoRA adapter as a `lora` delta.

    Raises:
        CheckpointError: a tensor is missing or damaged.
        BaseMismatchError: a tensor that is stored whole does not belong to this base.
        InputError: a shape is not the one that base and configuration imply, or tied layers part.
    """
    whole = read_whole(adapter)
    held = {s.tensor: s for s in adapter.sites if s.stack is None and _is_held_stacked(adapter, s)}
    alone = [s for s in adapter.sites if s.stack is None and s.tensor not in held]
    single = {s.name: _product(adapter, s) for s in alone}
    settled = settle_ties(
        adapter, single, whole.tensors, lambda first, second: single[first].equals(single[second])
    )
    names = adapter.architecture.names
    kept = {names[n]: product for n, product in single.items() if n not in settled.dropped}
    parted = [_experts(adapter, site) for site in adapter.sites if site.stack is not None]
    products = {**kept, **{tensor: product for pairs in parted for tensor, product in pairs}}
    stacks = {tensor: _matrices(adapter, site) for tensor, site in held.items()}
    turned = [name for name, product in products.items() if product.transposed]
    turned += [tensor for tensor, matrices in stacks.items() if matrices[0].transposed]
    extras = {**settled.extras, **_biases(adapter, settled.extras)}
    recipe = Recipe(
        method=Lora(rank=1),
        patterns=adapter.patterns([*products, *stacks], turned, list(stacks)),
        bits=options.bits,
        name=options.name,
        extras=extras,
        config={**whole.config, **settled.config},
    )
    each = {f"{n}[{part}]": p for n, matrices in stacks.items() for part, p in enumerate(matrices)}
    return low_rank_adapter("PEFT LoRA", {**products, **each}, recipe, whole.notes)


def _is_held_stacked(adapter: Adapter, site: AdapterSite) -> bool:
    """Return whether a site is a bare parameter that the files hold with all experts in it."""
    return site.is_parameter and len(adapter.base.info(site.tensor).shape) == 3


def _product(adapter: Adapter, site: AdapterSite) -> Product:
    """Return the update of one tensor, as its weight is stored or transposed."""
    shape, module = adapter.base.info(site.tensor).shape, site.module
    rank, scaling = rank_of(adapter.config, site), scaling_of(adapter.config, site)
    if TABLE_KEYS[0] in module.parts and len(shape) == 2:
        A = adapter.shaped(module.key(TABLE_KEYS[0]), (rank, shape[0]))
        B = adapter.shaped(module.key(TABLE_KEYS[1]), (shape[1], rank))
        return _scaled(A.T, B.T, scaling)
    if len(shape) > 2:
        return _convolution(adapter, site, rank, scaling)
    rows = adapter.tensors.info(module.key(B_KEY)).shape[:1]
    transposed = is_transposed(adapter, site, *rows)
    out, in_ = shape[::-1] if transposed else shape
    A = adapter.shaped(module.key(A_KEY), (rank, in_))
    B = adapter.shaped(module.key(B_KEY), (out, rank))
    return _scaled(B, A, scaling, transposed=transposed)


def _convolution(adapter: Adapter, site: AdapterSite, rank: int, scaling: float) -> Product:
    shape, module = adapter.base.info(site.tensor).shape, site.module
    A = adapter.tensors.info(module.key(A_KEY)).shape
    layer = adapter.architecture.layer(site.name.rpartition(".")[0])
    is_grouped = getattr(layer, "groups", 1) > 1
    # PEFT's lora_A of a grouped convolution is not grouped: it sees all inputs
    if is_grouped or (len(A) == len(shape) and A[2:] == shape[2:] and A[1] > shape[1]):
        raise InputError(
            f"{site.name} {shape} is a grouped convolution: each of its outputs sees {shape[1]}"
            f" inputs, but the adapter mixes all {A[1]} into each, which no such weight can hold",
            fix="train without this layer (exclude_modules); PEFT cannot merge it either",
        )
    down = adapter.shaped(module.key(A_KEY), (rank, *shape[1:]))
    up = adapter.shaped(module.key(B_KEY), (shape[0], rank, *(1 for _ in shape[2:])))
    return _scaled(up.reshape(-1, rank), down.reshape(rank, -1), scaling)


def _experts(adapter: Adapter, site: AdapterSite) -> Iterator[tuple[str, Product]]:
    """Yield the update of every expert's matrix.

    PEFT keeps the factors of all experts side by side: `lora_A` (experts * r, in) by expert, then
    rank; `lora_B` (out, r * experts) by rank, then expert.
    """
    assert site.stack is not None
    parts, base = site.stack.parts, adapter.base
    experts, rank = len(parts[0]), rank_of(adapter.config, site)
    heights = [base.info(part[0]).shape[0] for part in parts]
    width = base.info(parts[0][0]).shape[1]
    A = adapter.shaped(site.module.key(A_KEY), (experts * rank, width))
    B = adapter.shaped(site.module.key(B_KEY), (sum(heights), rank * experts))
    A, B = A.reshape(experts, rank, width), B.reshape(-1, rank, experts)
    scaling, begin = scaling_of(adapter.config, site), 0
    for part, height in zip(parts, heights, strict=True):
        for expert, tensor in enumerate(part):
            yield tensor, _scaled(B[begin : begin + height, :, expert], A[expert], scaling)
        begin += height


def _matrices(adapter: Adapter, site: AdapterSite) -> list[Product]:
    """Return the update of every matrix of a tensor (experts, rows, columns).

    Raises:
        InputError: the shapes do not tell whether the matrices are stored (in, out).
    """
    experts, rows, columns = adapter.base.info(site.tensor).shape
    rank, scaling = rank_of(adapter.config, site), scaling_of(adapter.config, site)
    layer = adapter.architecture.layer(site.name.rpartition(".")[0])
    inputs = adapter.tensors.info(site.module.key(A_KEY)).shape[1:]
    # PEFT 0.21 takes rows for inputs where the module says `is_transposed`, older ones always.
    turned = inputs == (rows,) if rows != columns else getattr(layer, "is_transposed", None)
    if turned is None:
        raise InputError(
            f"{site.name} holds square matrices, and nothing tells which side is their inputs",
            fix="give the base as a folder with its config.json, and install transformers",
        )
    in_, out = (rows, columns) if turned else (columns, rows)
    A = adapter.shaped(site.module.key(A_KEY), (experts * rank, in_))
    B = adapter.shaped(site.module.key(B_KEY), (out, rank * experts))
    A, B = A.reshape(experts, rank, in_), B.reshape(out, rank, experts)
    pairs = ((B[:, :, expert], A[expert]) for expert in range(experts))
    return [_scaled(*pair, scaling, transposed=bool(turned)) for pair in pairs]


def _scaled(B: Floats, A: Floats, scaling: float, *, transposed: bool = False) -> Product:
    pair = B.astype(np.float64) * scaling, A.astype(np.float64)
    return Product(pair=pair, transposed=transposed)


def _biases(adapter: Adapter, extras: Mapping[str, RawTensor]) -> dict[str, RawTensor]:
    """Return the biases that `lora_bias` changes: what lora_B adds to its layer's own bias."""
    biases = {}
    for site in adapter.sites:
        key = site.module.parts.get(BIAS_KEY)
        if key is None or site.stack is not None or site.is_parameter:
            continue
        name = site.tensor.removesuffix("weight") + "bias"
        if name not in adapter.base:
            raise InputError(
                f"{key} is a bias, and the base has no {name} to add it to",
                fix="train without lora_bias, or give the layer a bias of zeros in the base",
            )
        before = floats(adapter.base, name)
        if name in extras:
            before = FLOATS[extras[name].dtype].widen(extras[name].data)
        added = adapter.shaped(key, before.shape)
        if added.any():
            values = before + np.float32(scaling_of(adapter.config, site)) * added
            dtype = adapter.base.info(name).dtype
            biases[name] = RawTensor(
                dtype=dtype, shape=values.shape, data=stored.pack(values, dtype)
            )
    return biases
