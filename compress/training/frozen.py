"""The base model's side of an attachment: what is frozen, what trains whole, what is restored.

While a delta is attached, only the extras among the model's tensors change: those that are trained,
and stored, whole. The model's state dict holds the coefficients and the extras alone, so that
training checkpoints are small; the base does not change, so it need not be saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kilodelta.errors import InputError
from kilodelta.files.tying import untied
from kilodelta.format.targets import matches


class Frozen:
    """The tensors of a model that an attachment leaves alone, and the extras."""

    def __init__(
        self,
        names: Mapping[str, str],
        extras: Sequence[str],
        targets: Iterable[str],
    ) -> None:
        """Choose the extras.

        Args:
            names: state name to checkpoint name, for all tensors of the model.
            extras: globs over checkpoint names.
            targets: checkpoint names of the targets, which cannot be extras.

        Raises:
            InputError: a pattern of `extras` matches nothing, or a target.
        """
        self._names = dict(names)
        self.extras = tuple(name for name in names if matches(names[name], extras))
        self._flags: dict[str, bool] = {}
        self._before: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}
        _check(extras, self._names, set(targets))

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Freeze all but the extras; remember what may change."""
        state = self._now(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._flags = {name: p.requires_grad for name, p in parameters.items()}
        changing = [n for n in state if n in self.extras or n not in parameters]
        clones = {id(state[name]): state[name].detach().clone() for name in changing}
        self._before = {name: clones[id(state[name])] for name in changing}
        for name, tensor in parameters.items():
            tensor.requires_grad_(name in self.extras)
        _copy(self._trained, state)
        hooks: Any = model  # torch leaves these two untyped
        return [
            hooks.register_state_dict_post_hook(_SmallState(self)),
            hooks.register_load_state_dict_post_hook(_SmallLoad(self)),
        ]

    def restore(self, model: nn.Module) -> None:
        """Restore the model's tensors; keep what was trained for another `install`."""
        state = self._now(model)
        self._trained = {name: state[name].detach().clone() for name in self._before}
        _copy(self._before, state)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._flags[name])
            parameter.grad = None

    def base(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the base model's tensors by checkpoint name, as they were before.

        Of tied tensors, the name that files keep comes first.
        """
        now = self._now(model)
        return {self._names[name]: self._before.get(name, tensor) for name, tensor in now.items()}

    def trained(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the extras by checkpoint name, as they are now; tied ones once."""
        now = {name: tensor for name, tensor in self._now(model).items() if name in self.extras}
        return {self._names[name]: tensor.detach() for name, tensor in untied(now).items()}

    def drifted(self, model: nn.Module) -> list[str]:
        """Return the buffers (a batch norm's statistics) that changed and are no extras."""
        now = self._now(model)
        others = [name for name in self._before if name not in self.extras]
        return [self._names[n] for n in others if not torch.equal(now[n], self._before[n])]

    def _now(self, model: nn.Module) -> dict[str, Tensor]:
        """Read the tensors from the modules: an attached model's state dict leaves the base out."""
        modules = dict(model.named_modules(remove_duplicate=False))
        tensors: dict[str, Any] = {}
        for name in self._names:
            path, _, attribute = name.rpartition(".")
            owner = modules[path]
            tensors[name] = owner._parameters.get(attribute, owner._buffers.get(attribute))
        return tensors

    def is_frozen(self, name: str) -> bool:
        """Return whether a key of the model's state dict belongs to the base."""
        return name in self._names and name not in self.extras


class _SmallState:
    """State dict hook: leaves the base out."""

    def __init__(self, frozen: Frozen) -> None:
        self._frozen = frozen

    def __call__(self, model: nn.Module, state: dict[str, Any], prefix: str, meta: Any) -> None:
        for key in list(state):
            if key.startswith(prefix) and self._frozen.is_frozen(key[len(prefix) :]):
                del state[key]


class _SmallLoad:
    """Load hook: does not report the base as missing."""

    def __init__(self, frozen: Frozen) -> None:
        self._frozen = frozen

    def __call__(self, model: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [key for key in keys.missing_keys if not self._is_base(key)]

    def _is_base(self, key: str) -> bool:
        parts = key.split(".")
        return any(self._frozen.is_frozen(".".join(parts[i:])) for i in range(len(parts)))


def _check(extras: Sequence[str], names: dict[str, str], targets: set[str]) -> None:
    for glob in extras:
        if not any(matches(name, (glob,)) for name in names.values()):
            raise InputError(
                f"no tensor of the model matches the extra {glob!r}",
                fix=f"patterns match whole names, such as {next(iter(names.values()), 'none')}",
            )
    both = sorted(name for name in names.values() if name in targets and matches(name, extras))
    if both:
        raise InputError(
            f"{both[0]} is a target and an extra as well",
            fix="exclude it from the targets, or leave it out of the extras",
        )


def _copy(values: dict[str, Tensor], state: dict[str, Any]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            state[name].copy_(value)
