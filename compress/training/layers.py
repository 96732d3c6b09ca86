"""How an attached layer computes with its update: forward hooks, one class per kind of layer.

The base module keeps its class, its names and its tensors. For layers whose output is linear in the
weight, the update is applied to the activations, x right left^T, without the matrix dW unless that
is cheaper; a linear layer in training may run with W + dW in place of W, where that is cheapest.
Every other layer (grouped and transposed convolutions, attention's packed projections, experts that
one parameter stacks, parameters that a module uses by hand, subclasses with another forward pass)
always runs with W + dW in place of W.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kilodelta.compress.training.products.narrowing import BESIDE, Beside
from kilodelta.compress.training.products.widening import weight_of
from kilodelta.compress.training.sites import AttachedTarget, Site
from kilodelta.compress.training.through_grid import TargetGrid
from kilodelta.compress.training.update import FactoredUpdate
from kilodelta.models.layers import is_conv1d

_SHARDED = "_kilodelta_sharded"
"""The attribute that says that a layer's whole weight exists only while it computes."""
_UPDATE = "_kilodelta_update"
"""The attribute in which an attached linear layer holds its update while it runs."""


class UpdateSource(Protocol):
    """What knows the updates."""

    def update(self, index: int) -> FactoredUpdate:
        """Compute the update of target `index`, float32."""

    def grid(self, index: int) -> TargetGrid | None:
        """Return the grid that the target's merged weight is rounded to, if to any."""


@dataclass(frozen=True, eq=False)
class LayerHook(ABC):
    """A site with access to its target's update; pickles and copies with the model."""

    source: UpdateSource
    index: int
    site: Site
    transposed: bool

    @abstractmethod
    def install(self) -> list[RemovableHandle]:
        """Hook into the site's module."""

    def update(self, like: Tensor) -> FactoredUpdate:
        """Compute the update on `like`'s device, in its type unless autocast will choose one."""
        update = self.source.update(self.index)
        dtype = update.left.dtype if torch.is_autocast_enabled(like.device.type) else like.dtype
        return update.map(lambda tensor: tensor.to(like.device, dtype))

    def hide_weight(self) -> Tensor:
        """Let the site compute with W + dW, and return that; `show_weight` undoes it.

        Where the target has a grid, W + dW is rounded to it, the gradient straight through. An
        attribute of the instance hides the parameter, which stays as it is.
        """
        owner, attribute = self.site.owner, self.site.attribute
        weight: Any = owner._parameters[attribute]
        change = self._change(weight.device).view_as(weight)
        grid = self.source.grid(self.index)
        # Add in the wider type and round once: a half-precision sum would lose small updates.
        wide = torch.promote_types(weight.dtype, change.dtype)
        total = weight.to(wide) + change if grid is None else grid.merged(weight, change.float())
        merged: Tensor = total.to(weight.dtype)
        owner.__dict__[attribute] = merged
        return merged

    def _change(self, device: torch.device) -> Tensor:
        """Compute dW as the parameter is stored."""
        update = self.source.update(self.index).map(lambda t: t.to(device)).matrix()
        return update.t() if self.transposed else update

    def show_weight(self) -> bool:
        """Let the site compute with W again; return whether W was hidden."""
        return self.site.owner.__dict__.pop(self.site.attribute, None) is not None


class AddLinear(LayerHook):
    """`nn.Linear` and Conv1D: y + (x right) left^T, or y + x dW^T where there are many rows.

    In training it runs with W + dW in place of W where that is cheapest, and only in float32: in a
    narrower type the sum would lose small updates. Without gradients W stays in its place, so that
    threads can share a model.
    """

    def install(self) -> list[RemovableHandle]:
        owner = self.site.owner
        return [
            owner.register_forward_pre_hook(self._before, with_kwargs=True),
            owner.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        weight: Any = module._parameters.get("weight")
        given = _input(args, kwargs)
        if self.source.grid(self.index) is not None:
            self.hide_weight()
            return
        if not (torch.is_grad_enabled() and _computes_in_float32(weight, given)):
            return
        if _SHARDED in module.__dict__:  # the sum would keep the whole weight until the gradient
            return
        update = self.update(given)
        if sum_is_cheaper(given.numel() // given.shape[-1], update):
            left, right = reversed(update.pair()) if self.transposed else update.pair()
            # One fused product, W + left right^T: dW alone is never held.
            module.__dict__["weight"] = weight_of(module).addmm(left, right.t())
            return
        module.__dict__[_UPDATE] = update
        left, right = update.left, update.right
        if update.is_thin and not dense_is_cheaper(given.numel() // given.shape[-1], left, right):
            module.__dict__[BESIDE] = Beside(left, right)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        was_hidden = self.show_weight()
        update = module.__dict__.pop(_UPDATE, None)
        beside: Beside | None = module.__dict__.pop(BESIDE, None)
        is_added = was_hidden or (beside is not None and beside.added)
        if is_added or output is None:  # None: the layer has raised an error
            return output
        given = _input(args, kwargs)
        update = update or self.update(given)
        rows = given.reshape(-1, given.shape[-1])
        total = output.reshape(-1, output.shape[-1])
        if not dense_is_cheaper(rows.shape[0], update.left, update.right):
            return update.add_to(total, rows).view_as(output)
        return total.addmm(rows, update.matrix().t()).view_as(output)


class _AddOutput(LayerHook):
    """A layer to whose output the update's own output is added."""

    def install(self) -> list[RemovableHandle]:
        return [self.site.owner.register_forward_hook(self._after, with_kwargs=True)]

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return self.add(module, _input(args, kwargs), output)

    @abstractmethod
    def add(self, module: Any, given: Tensor, output: Tensor) -> Tensor:
        """Add the update's output for the input `given`."""


class AddEmbedding(_AddOutput):
    """`nn.Embedding`: y + left[ids] right^T."""

    def add(self, module: Any, given: Tensor, output: Tensor) -> Tensor:
        left, right = self.update(output).pair()
        return output + F.embedding(given, left) @ right.t()


class AddConv2d(_AddOutput):
    """`nn.Conv2d` with one group and zero padding: K filters `right`, then 1 x 1 filters `left`."""

    def add(self, module: Any, given: Tensor, output: Tensor) -> Tensor:
        left, right = self.update(given).pair()
        _, *kernel = module.weight.shape
        options = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        if dense_is_cheaper(1 << 30, left, right):
            return output + F.conv2d(given, (left @ right.t()).view(-1, *kernel), **options)
        hidden = F.conv2d(given, right.t().reshape(-1, *kernel), **options)
        return output + F.conv2d(hidden, left[:, :, None, None])


class SwapWeight(LayerHook):
    """Any layer: it runs with W + dW, materialised, in place of W."""

    def install(self) -> list[RemovableHandle]:
        host = self.site.host
        return [
            # First of all hooks: `nn.utils.spectral_norm` computes the weight in one, from ours.
            host.register_forward_pre_hook(self._before, prepend=True),
            host.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, module: nn.Module, args: Any) -> None:
        self.hide_weight()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.show_weight()


class SwapRecurrent(SwapWeight):
    """`nn.RNN`, `nn.LSTM` and `nn.GRU`: their kernels take the weights from a list beside them."""

    def hide_weight(self) -> Tensor:
        merged = super().hide_weight()
        self._put(merged)
        return merged

    def show_weight(self) -> bool:
        self._put(self.site.owner._parameters[self.site.attribute])
        return super().show_weight()

    def _put(self, weight: Tensor | None) -> None:
        owner: Any = self.site.owner
        owner._flat_weights[owner._flat_weights_names.index(self.site.attribute)] = weight


@dataclass(frozen=True, eq=False)
class SwapStack(SwapWeight):
    """A parameter (n, rows, columns) whose every matrix is a target: it runs with W + dW.

    Attributes:
        count: n; the targets' indices begin with `index`.
    """

    count: int

    def _change(self, device: torch.device) -> Tensor:
        """Compute dW (n, rows, columns), all matrices in one batched product."""
        each = map(self.source.update, range(self.index, self.index + self.count))
        updates = [update.map(lambda t: t.to(device)).pair() for update in each]
        left, right = (torch.stack(factors) for factors in zip(*updates, strict=True))
        if self.transposed:
            left, right = right, left
        return left @ right.transpose(1, 2)


def mark_sharded(block: nn.Module) -> None:
    """Note that the layers of a block have their whole weights only while it computes."""
    for layer in block.modules():
        layer.__dict__[_SHARDED] = True


def _input(args: Any, kwargs: Any) -> Any:
    """Return a layer's input."""
    return args[0] if args else next(iter(kwargs.values()))


def _computes_in_float32(weight: Any, given: Tensor) -> bool:
    """Check that a layer computes in float32, on a whole weight.

    Not under autocast, and neither with a shard of a weight (DTensor) nor with one that lies on
    another device (offloaded).
    """
    return (
        type(weight) is nn.Parameter
        and weight.device == given.device
        and weight.dtype == given.dtype == torch.float32
        and not torch.is_autocast_enabled(given.device.type)
    )


def sum_is_cheaper(rows: int, update: FactoredUpdate) -> bool:
    """Compare a training step on W + dW with one that has the factors beside W.

    The sum costs dW, the gradient of dW, and from that the gradients of the factors that have one.

    Args:
        rows: of the layer's input.
        update: of its weight.

    Returns:
        Whether the sum costs fewer multiplications.
    """
    left, right = update.left, update.right
    (out, inner), in_ = left.shape, right.shape[0]
    beside = rows * inner * ((2 + left.requires_grad) * out + (2 + right.requires_grad) * in_)
    sides = (left, update.rows), (right, update.inner)
    trained = sum(any(t is not None and t.requires_grad for t in side) for side in sides)
    return out * in_ * (rows + inner * (1 + trained)) < beside


def dense_is_cheaper(rows: int, left: Tensor, right: Tensor) -> bool:
    """Compare one product with dW = left right^T, dW included, with two products with the factors.

    In training both cost three times as many multiplications.

    Args:
        rows: of the layer's input.
        left: (out, K).
        right: (in, K).

    Returns:
        Whether dW costs fewer.
    """
    out, inner = left.shape
    in_ = right.shape[0]
    return out * in_ * (rows + inner) < rows * inner * (out + in_)


_Kind = type[AddLinear] | type[AddEmbedding] | type[AddConv2d] | type[SwapWeight]
"""`SwapRecurrent` is a `SwapWeight`."""
_BY_FORWARD: dict[Callable[..., Any], _Kind] = {
    nn.Linear.forward: AddLinear,
    nn.Embedding.forward: AddEmbedding,
    nn.Conv2d.forward: AddConv2d,
}
"""By forward pass, not by class: a subclass that overrides it may do anything with its weight."""


def _kind(site: Site) -> _Kind:
    owner: Any = site.owner
    if isinstance(owner, nn.RNNBase):
        return SwapRecurrent
    if site.attribute != "weight" or site.host is not owner:
        return SwapWeight
    forward: Any = type(owner).forward
    if is_conv1d(owner):
        return AddLinear if forward.__qualname__ == "Conv1D.forward" else SwapWeight
    kind = _BY_FORWARD.get(forward, SwapWeight)
    if kind is AddConv2d and (owner.groups != 1 or owner.padding_mode != "zeros"):
        return SwapWeight
    return kind


def takes_grid(site: Site) -> bool:
    """Return whether a site can compute with a merged weight that is rounded to a grid."""
    return _kind(site) in (AddLinear, SwapWeight, SwapRecurrent)


def install(source: UpdateSource, places: Sequence[AttachedTarget]) -> list[RemovableHandle]:
    """Let all sites of a parameter compute with its update; the handles undo it.

    Args:
        source: knows the updates.
        places: the parameter as a target, or all matrices of a stack in order.
    """
    target = places[0].target
    handles: list[RemovableHandle] = []
    for site in places[0].sites:
        place = source, target.index, site, target.transposed
        hook = _kind(site)(*place) if target.part is None else SwapStack(*place, len(places))
        handles += hook.install()
    return handles
