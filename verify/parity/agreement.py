"""Agreement with the tuned model: what a fine-tune as a kilodelta keeps of the original."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kilodelta.progress import Event, Progress, silent
from kilodelta.verify.parity.cases import live
from kilodelta.verify.parity.metrics import compare
from kilodelta.verify.parity.result import Agreement, Closeness
from kilodelta.verify.runners.runner import Batch
from kilodelta.verify.runners.torch_runner import TorchRunner


def agreement(
    tuned: torch.nn.Module,
    merged: torch.nn.Module,
    base: torch.nn.Module,
    *,
    outputs: Sequence[str],
    scores: Sequence[str],
    batches: Sequence[Batch],
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[Agreement, ...]:
    """Run all three in float32 on every batch; padding does not count.

    `outputs` names what each returns, `scores` those of them that are class scores.
    """
    runners = [
        TorchRunner(module, outputs, precision="float32", device=device)
        for module in (tuned, merged, base)
    ]
    parts: dict[str, list[tuple[int, Closeness, Closeness]]] = {name: [] for name in outputs}
    for done, batch in enumerate(batches, 1):
        told = [runner.run(batch) for runner in runners]
        for name in outputs:
            rows = [_rows(found[name], batch) for found in told]
            parts[name].append(_part(*rows, classes=name in scores))
        progress(Event(stage="agreement", done=done, total=len(batches), unit="batches"))
    return tuple(_whole(name, found) for name, found in parts.items())


def _rows(output: NDArray[Any], batch: Batch) -> NDArray[Any]:
    counted = live(output, batch)
    return counted.reshape(-1, counted.shape[-1])


def _part(
    tuned: NDArray[Any], merged: NDArray[Any], base: NDArray[Any], *, classes: bool
) -> tuple[int, Closeness, Closeness]:
    to_merged, to_base = (_close(found, tuned, classes) for found in (merged, base))
    return len(tuned), to_merged, to_base


def _close(found: NDArray[Any], tuned: NDArray[Any], classes: bool) -> Closeness:
    metrics = compare(found, tuned, classes=classes)
    return Closeness(top1=metrics.top1, cosine=metrics.cosine, kl=metrics.kl)


def _whole(name: str, parts: Sequence[tuple[int, Closeness, Closeness]]) -> Agreement:
    counts = [count for count, _, _ in parts]
    return Agreement(
        output=name,
        rows=sum(counts),
        merged=_mean([merged for _, merged, _ in parts], counts),
        base=_mean([base for _, _, base in parts], counts),
    )


def _mean(parts: Sequence[Closeness], counts: Sequence[int]) -> Closeness:
    """Every number is a mean over rows, so the whole is a weighted mean of the parts."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.average(known, weights=counts)) if known else None

    cosine = mean([part.cosine for part in parts])
    return Closeness(
        top1=mean([part.top1 for part in parts]),
        cosine=1.0 if cosine is None else cosine,
        kl=mean([part.kl for part in parts]),
    )
