"""A delta in training: its coefficients as a module, hooked into the model that it changes.

The attachment becomes the submodule `kilodelta` of the model, so that optimisers, `.to(device)`,
distributed wrappers and checkpoints find the coefficients. What all targets share (NOLA's mixed
factors) is computed once per forward pass, and again when a coefficient has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kilodelta.compress.training import encoders, layers
from kilodelta.compress.training.factors import CoefficientValues, factors_of
from kilodelta.compress.training.frozen import Frozen
from kilodelta.compress.training.precision import Precision, choose, from_numbers, to_numbers
from kilodelta.compress.training.sites import AttachedTarget, by_parameter
from kilodelta.compress.training.through_grid import TargetGrid, Ways
from kilodelta.compress.training.trainables import GroupSet, submodule_name
from kilodelta.compress.training.update import FactoredUpdate
from kilodelta.format.methods import Method
from kilodelta.format.targets import Patterns

NAME = "kilodelta"
"""The attachment's name in the model."""


class Attachment(nn.Module):
    """The trained side of a delta: from coefficients to the factors of every target's update.

    Attributes:
        method: as it is trained.
        patterns: which tensors of the base the delta changes.
        places: the targets in the model, in file order.
        seed: of the random bases.
        frozen: the base's side, and the extras.
        factors: how the method computes.
        file: the groups that the whole file has once.
        own: the groups of each target.
        precision: how coefficients are rounded; None for not at all.
        ways: in which ways it will be applied, where it trains for several or through a grid.
    """

    def __init__(
        self,
        method: Method,
        patterns: Patterns,
        places: Sequence[AttachedTarget],
        frozen: Frozen,
        seed: int,
    ) -> None:
        super().__init__()
        self.method = method
        self.patterns = patterns
        self.places = tuple(places)
        self.seed = seed
        self.frozen = frozen
        self.precision: Precision | None = None
        targets = [place.target for place in places]
        self.factors = factors_of(method, seed, targets)
        generator = torch.Generator().manual_seed(seed & (2**63 - 1))
        self.file = GroupSet(method.shared(), self.factors.start_shared(generator))
        self.targets = nn.Module()
        for target in targets:
            starts = self.factors.start(target, generator)
            self.targets.add_module(submodule_name(target), GroupSet(method.groups(target), starts))
        self.rounding: Tensor
        self.register_buffer("rounding", to_numbers(None, self.factors.settled))
        self.ways = Ways()
        self._handles: list[RemovableHandle] = []
        self._cache = _Cache()
        # Where the layers are, or every forward pass would copy the coefficients there.
        self.to(places[0].parameter.device)

    def forward(self, given: Tensor) -> Tensor:
        """Return the input: where the model is an `nn.Sequential`, this is its last layer."""
        return given

    @property
    def own(self) -> list[GroupSet]:
        """The coefficients, target by target."""
        return list(self.targets._modules.values())  # type: ignore[arg-type]

    def values(self) -> CoefficientValues:
        """Return what the coefficients stand for now."""
        return CoefficientValues(shared=self.file, own=self.own, precision=self.precision)

    def update(self, index: int) -> FactoredUpdate:
        """Compute the update of target `index`, float32."""
        values = self.values()
        prepared = self._cache.get(self)
        return self.factors.update(prepared, values, index)

    def grid(self, index: int) -> TargetGrid | None:
        """Return the grid that target `index` is rounded to in the present way, if to any."""
        return None if self.ways.now is None else self.ways.now.grids.get(index)

    def start_on_grid(self, share: float) -> None:
        """Let updates begin as large as a share of the steps of the grids that they train through.

        An update that is far below half a step changes no code of a merge in the grid, however well
        it fits beside the base. One of random signs changes a code now and then, here and there,
        and each further change of it then changes codes in proportion, as dither lets a quantiser
        follow a small signal (Roberts, https://doi.org/10.1109/TIT.1962.1057702). A target on no
        grid begins with the mean of the others' sizes. Call it before the first step.

        Args:
            share: the root mean square of an update, over the mean step of its grid.
        """
        steps = {i: grid.spacing for way in self.ways.all for i, grid in way.grids.items()}
        if not steps:
            return
        mean = sum(steps.values()) / len(steps)
        sizes = [share * steps.get(place.target.index, mean) for place in self.places]
        self.factors.start_wide(self.file, self.own, sizes)
        self._cache.clear()

    def quantise(self, bits: int | None) -> None:
        """Compute, from now on, with what a file of so many bits holds; None: with exact values.

        Raises:
            InputError: the method cannot have so many bits.
        """
        self.precision = None if bits is None else self.precision_for(bits)
        self.rounding.copy_(to_numbers(self.precision, self.factors.settled))
        self._cache.clear()

    def precision_for(self, bits: int) -> Precision:
        """Choose how the coefficients are rounded to so many bits.

        Raises:
            InputError: the method cannot have so many bits.
        """
        targets = [place.target for place in self.places]
        chosen = choose(self.method, self.factors.widest(), targets, bits)
        return self.factors.settle(self.file, chosen)

    def fits(self, model: nn.Module) -> bool:
        """Return whether the targets' layers are this model's."""
        modules = set(model.modules())
        return all(site.owner in modules for place in self.places for site in place.sites)

    def install(self, model: nn.Module) -> None:
        """Hook into a model, whose tensors stop training."""
        self._handles = [*self.frozen.install(model)]
        for places in by_parameter(self.places):
            self._handles += layers.install(self, places)
        self._handles += encoders.install(model)
        self._handles.append(model.register_forward_pre_hook(self._on_forward))
        model.add_module(NAME, self)

    def remove(self, model: nn.Module) -> None:
        """Remove the hooks, and restore the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        delattr(model, NAME)
        self.frozen.restore(model)

    def _on_forward(self, model: nn.Module, args: Any) -> None:
        """Begin a training step with new shared tensors, which belong to its graph.

        A layer that is computed twice (activation checkpointing) must find the same ones again.
        """
        if torch.is_grad_enabled():
            self._cache.clear()
            self._cache.get(self)

    def train(self, mode: bool = True) -> Attachment:
        self._cache.clear()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Attachment:
        self._cache.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.factors.draw(self.rounding.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.precision = from_numbers(self.rounding, self.method, self.factors.settled)
        self._cache.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": _Cache()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.factors.draw(self.rounding.device)


class _Cache:
    """What the targets share in one forward pass, for as long as no coefficient changes."""

    def __init__(self) -> None:
        self._prepared: tuple[Tensor, ...] | None = None
        self._watched: list[tuple[nn.Parameter, int]] = []
        self._has_graph = False

    def clear(self, gradient: Tensor | None = None) -> None:
        """Forget; called as a tensor's hook when the backward pass has used the graph up."""
        self._prepared = None

    def get(self, attachment: Attachment) -> tuple[Tensor, ...]:
        """Return the shared tensors, computed again if a coefficient has changed since."""
        if self._prepared is None or not self._holds():
            self._prepared = attachment.factors.prepare(attachment.values())
            self._has_graph = torch.is_grad_enabled()
            if not torch.compiler.is_compiling():
                self._watch(attachment, self._prepared)
        return self._prepared

    def _watch(self, attachment: Attachment, prepared: tuple[Tensor, ...]) -> None:
        # An optimiser changes parameters in place, which raises their version.
        self._watched = [(p, p._version) for p in attachment.parameters()]
        for tensor in prepared:
            # A view has its gradient before the others of its base: too early to forget them.
            if tensor.requires_grad and not tensor._is_view():
                tensor.register_hook(self.clear)  # type: ignore[no-untyped-call]

    def _holds(self) -> bool:
        if torch.is_grad_enabled() and not self._has_graph:
            return False
        if torch.compiler.is_compiling():  # versions are not traced; the model's hook clears
            return True
        return all(p._version == version for p, version in self._watched)
