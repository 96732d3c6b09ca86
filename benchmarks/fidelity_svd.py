"""The opponent of fidelity.py without training: the change's largest singular parts, in 4 bits.

All matrices compete for the bytes: the parts sigma u v^T of all changes are ranked by the energy
that a byte buys, sigma^2 / (out + in), and taken while they fit. Each factor has its own float16
scale, the best of several clips; only its nibbles and scales are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

SCALE_BYTES = 2
CLIPS = torch.linspace(0.4, 1.0, 13)


@torch.no_grad()
def merge_svd(
    base: nn.Module,
    tuned: nn.Module,
    budget: int,
    changes: Callable[[str], bool] = lambda name: ".layer." in f".{name}",
) -> int:
    """Add the parts that fit to the linear layers of `base` whose names `changes` accepts.

    Returns:
        The bytes spent.
    """
    tuned_layers = dict(_linears(tuned, changes))
    parts = []
    for name, layer in _linears(base, changes):
        U, S, Vh = torch.linalg.svd(tuned_layers[name].weight - layer.weight, full_matrices=False)
        cost = sum(layer.weight.shape) / 2 + 2 * SCALE_BYTES
        root = S.sqrt()
        parts += [
            (float(S[i]) ** 2 / cost, cost, layer, U[:, i] * root[i], Vh[i] * root[i])
            for i in range(len(S))
        ]
    spent = 0.0
    for _, cost, layer, left, right in sorted(parts, key=lambda part: -part[0]):
        if spent + cost <= budget:
            layer.weight += torch.outer(_int4(left), _int4(right))
            spent += cost
    return int(spent)


def _linears(model: nn.Module, changes: Callable[[str], bool]) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and changes(name):
            yield name, module


def _int4(values: Tensor) -> Tensor:
    """Rounded to -7 .. 7 times a scale."""
    scales = (values.abs().max() / 7 * CLIPS).half().float()[:, None]
    rounded = (values / scales).round().clamp(-7, 7) * scales
    return rounded[(rounded - values).square().sum(1).argmin()]
