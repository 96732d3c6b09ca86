"""What an attached layer adds to its output: forward hooks, one kind a layer type.

The base module stays what it is (same class, same names, same tensors). For the layers whose
output is linear in the weight, the update is applied to the activations: x right left^T, never
the matrix dW, unless dW is the cheaper way; a linear layer that trains may take W + dW in place of
W, where that is cheaper still. Every other layer (grouped and transposed convolutions, attention's
packed projections, parameters that a module uses by hand, subclasses with a forward pass of their
own) always computes with W + dW in place of W while it runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kilodelta.compress.training.sites import AttachedTarget, Site, is_conv1d
from kilodelta.compress.training.update import FactoredUpdate

_UPDATE = "_kilodelta_update"
"""What an attached linear layer holds its update as while it runs."""


class Source(Protocol):
    """Who knows the updates."""

    def update(self, index: int) -> FactoredUpdate:
        """That of target `index`, float32."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """A site with its target's update within reach; pickles and copies with the model."""

    source: Source
    index: int
    site: Site
    transposed: bool

    def update(self, like: Tensor) -> FactoredUpdate:
        """The update where `like` lives; in its type too, unless autocast will choose one."""
        found = self.source.update(self.index)
        dtype = found.left.dtype if torch.is_autocast_enabled(like.device.type) else like.dtype
        return found.map(lambda tensor: tensor.to(like.device, dtype))


class _Added(_Layer, ABC):
    """A layer whose output is linear in the weight: the update's output is added."""

    def install(self) -> list[RemovableHandle]:
        return [self.site.owner.register_forward_hook(self._hook, with_kwargs=True)]

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return self.add(module, _given(args, kwargs), output)

    @abstractmethod
    def add(self, module: Any, given: Tensor, output: Tensor) -> Tensor:
        """`output` with the update's own output of `given` added."""


class AddLinear(_Layer):
    """`nn.Linear` and Conv1D: y + (x right) left^T, or y + x dW^T where there are many rows.

    In training it runs with W + dW in place of W where that is cheapest, and only in float32: in a
    narrower type the sum would lose small updates. Without gradients W stays in its place, so that
    threads can share a model.
    """

    def install(self) -> list[RemovableHandle]:
        owner = self.site.owner
        return [
            owner.register_forward_pre_hook(self._before, with_kwargs=True),
            owner.register_forward_hook(self._hook, with_kwargs=True, always_call=True),
        ]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        weight: Any = module._parameters.get("weight")
        given = _given(args, kwargs)
        if not (torch.is_grad_enabled() and _computes_in_float32(weight, given)):
            return
        update = self.update(given)
        if sum_is_cheaper(given.numel() // given.shape[-1], update):
            left, right = reversed(update.pair()) if self.transposed else update.pair()
            _hide(self.site, weight.addmm(left, right.t()))
        else:
            module.__dict__[_UPDATE] = update

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = _show(self.site)
        update = module.__dict__.pop(_UPDATE, None)
        if hidden or output is None:
            return output
        given = _given(args, kwargs)
        update = update or self.update(given)
        rows = given.reshape(-1, given.shape[-1])
        total = output.reshape(-1, output.shape[-1])
        if not dense_is_cheaper(rows.shape[0], update.left, update.right):
            return update.add_to(total, rows).view_as(output)
        return total.addmm(rows, update.matrix().t()).view_as(output)


class AddEmbedding(_Added):
    """`nn.Embedding`: y + left[ids] right^T."""

    def add(self, module: Any, given: Tensor, output: Tensor) -> Tensor:
        left, right = self.update(output).pair()
        return output + F.embedding(given, left) @ right.t()


class AddConv2d(_Added):
    """`nn.Conv2d` with one group and zero padding: K filters `right`, then 1 x 1 filters `left`."""

    def add(self, module: Any, given: Tensor, output: Tensor) -> Tensor:
        left, right = self.update(given).pair()
        _, *kernel = module.weight.shape
        options = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        if dense_is_cheaper(1 << 30, left, right):
            return output + F.conv2d(given, (left @ right.t()).view(-1, *kernel), **options)
        hidden = F.conv2d(given, right.t().reshape(-1, *kernel), **options)
        return output + F.conv2d(hidden, left[:, :, None, None])


class Swapped(_Layer):
    """Any layer: it runs with W + dW, materialised, in place of W."""

    def install(self) -> list[RemovableHandle]:
        host = self.site.host
        return [
            host.register_forward_pre_hook(self._before),
            host.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, module: nn.Module, args: Any) -> None:
        weight: Any = self.site.owner._parameters[self.site.attribute]
        update = self.source.update(self.index).map(lambda t: t.to(weight.device)).matrix()
        change = (update.t() if self.transposed else update).view_as(weight)
        wide = torch.promote_types(weight.dtype, change.dtype)
        _hide(self.site, (weight.to(wide) + change).to(weight.dtype))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        _show(self.site)


def _hide(site: Site, merged: Tensor) -> None:
    """Let a site compute with W + dW: an instance's attribute hides a parameter and leaves it as it
    is."""
    site.owner.__dict__[site.attribute] = merged


def _show(site: Site) -> bool:
    """Let it compute with W again; whether W was hidden."""
    return site.owner.__dict__.pop(site.attribute, None) is not None


def _given(args: Any, kwargs: Any) -> Any:
    """A layer's input."""
    return args[0] if args else next(iter(kwargs.values()))


def _computes_in_float32(weight: Any, given: Tensor) -> bool:
    """Whether a layer does; not autocast, and neither a part of a weight (DTensor) nor one that
    is elsewhere (offloaded)."""
    return (
        type(weight) is nn.Parameter
        and weight.device == given.device
        and weight.dtype == given.dtype == torch.float32
        and not torch.is_autocast_enabled(given.device.type)
    )


def sum_is_cheaper(rows: int, update: FactoredUpdate) -> bool:
    """Whether a training step on W + dW costs fewer operations than one with the factors beside
    W, for `rows` rows of input.

    The sum costs dW, the gradient of dW, and those of the factors that have one out of it.
    """
    left, right = update.left, update.right
    (out, inner), in_ = left.shape, right.shape[0]
    beside = rows * inner * ((2 + left.requires_grad) * out + (2 + right.requires_grad) * in_)
    sides = (left, update.rows), (right, update.inner)
    trained = sum(any(t is not None and t.requires_grad for t in side) for side in sides)
    return out * in_ * (rows + inner * (1 + trained)) < beside


def dense_is_cheaper(rows: int, left: Tensor, right: Tensor) -> bool:
    """Whether dW = left right^T and one product with it cost fewer operations than two products
    with the factors, for `rows` rows of input; three times as many in training, on both sides."""
    out, inner = left.shape
    in_ = right.shape[0]
    return out * in_ * (rows + inner) < rows * inner * (out + in_)


_Kind = type[AddLinear] | type[AddEmbedding] | type[AddConv2d] | type[Swapped]
_BY_FORWARD: dict[Callable[..., Any], _Kind] = {
    nn.Linear.forward: AddLinear,
    nn.Embedding.forward: AddEmbedding,
    nn.Conv2d.forward: AddConv2d,
}
"""A subclass with a forward pass of its own may do anything with its weight, so it is not here."""


def _kind(site: Site) -> _Kind:
    owner: Any = site.owner
    if site.attribute != "weight" or site.host is not owner:
        return Swapped
    forward: Any = type(owner).forward
    if is_conv1d(owner):
        return AddLinear if forward.__qualname__ == "Conv1D.forward" else Swapped
    kind = _BY_FORWARD.get(forward, Swapped)
    if kind is AddConv2d and (owner.groups != 1 or owner.padding_mode != "zeros"):
        return Swapped
    return kind


def install(source: Source, place: AttachedTarget) -> list[RemovableHandle]:
    """Let all sites of a target compute with its update; the handles undo it."""
    target = place.target
    handles: list[RemovableHandle] = []
    for site in place.sites:
        handles += _kind(site)(source, target.index, site, target.transposed).install()
    return handles
