"""Attached layers inside `nn.TransformerEncoder`, whose fast path calls none of its layers.

In eval mode it packs a padded batch into a nested tensor, and each of its layers hands its weights
to one fused function, which sees no update beside a weight. Where hooks are present, a layer takes
its slow path instead, which fails on nested tensors. So in eval mode the encoder runs with W + dW
in place of every attached W, and without our hooks below it: it computes as the merged model does,
down to the zeros at padded positions. In training mode there is no fast path, and hooks work.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from kilodelta.compress.training.layers import LayerHook

_HOOKS = "_forward_hooks", "_forward_pre_hooks"


class EncoderHook:
    """Hooks of one encoder; pickles and copies with the model."""

    def __init__(self) -> None:
        self._hidden: list[LayerHook] = []
        self._hooks: list[tuple[OrderedDict[int, Any], OrderedDict[int, Any]]] = []
        self._nests = False

    def install(self, encoder: nn.Module) -> list[RemovableHandle]:
        """Hook into an encoder."""
        return [
            encoder.register_forward_pre_hook(self._before),
            encoder.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, encoder: Any, args: Any) -> None:
        # While a compiler traces, torch takes the slow path, and what follows cannot be traced.
        if encoder.layers[0].training or torch.compiler.is_compiling():
            return
        self._hidden = list(_ours(encoder))
        merged = [hook.hide_weight() for hook in self._hidden]
        for module in encoder.modules():
            if module is not encoder:
                self._drop_hooks(module)
        if any(weight.requires_grad for weight in merged) and encoder.use_nested_tensor:
            # torch asks the first layer alone whether it has gradients, which rule nesting out.
            self._nests, encoder.use_nested_tensor = True, False

    def _drop_hooks(self, module: nn.Module) -> None:
        for kind in _HOOKS:
            hooks: OrderedDict[int, Any] = getattr(module, kind)
            kept = OrderedDict((key, hook) for key, hook in hooks.items() if not _owner(hook))
            if len(kept) < len(hooks):
                self._hooks.append((hooks, OrderedDict(hooks)))
                _refill(hooks, kept)

    def _after(self, encoder: Any, args: Any, output: Any) -> None:
        for hooks, all_hooks in self._hooks:
            _refill(hooks, all_hooks)
        for hook in self._hidden:
            hook.show_weight()
        if self._nests:
            encoder.use_nested_tensor = True
        self._hooks, self._hidden, self._nests = [], [], False


def _refill(hooks: OrderedDict[int, Any], content: OrderedDict[int, Any]) -> None:
    """Change a module's hooks in place, for handles refer to the dictionary."""
    hooks.clear()
    hooks.update(content)


def _owner(hook: Any) -> LayerHook | None:
    """Return the layer hook whose method a hook is."""
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, LayerHook) else None


def _ours(encoder: nn.Module) -> Iterator[LayerHook]:
    """Yield the layer hooks below an encoder, one for each site."""
    seen = set()
    for module in encoder.modules():
        for kind in _HOOKS:
            for hook in getattr(module, kind).values():
                owner = _owner(hook)
                if owner is not None and id(owner) not in seen:
                    seen.add(id(owner))
                    yield owner


def install(model: nn.Module) -> list[RemovableHandle]:
    """Hook into every `nn.TransformerEncoder` of a model that has attached layers."""
    handles: list[RemovableHandle] = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(True for _ in _ours(module)):
            handles += EncoderHook().install(module)
    return handles
