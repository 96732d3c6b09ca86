"""Measure agreement with the tuned model: what a `.kd` file keeps of its fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kilodelta.errors import InputError, KiloDeltaError
from kilodelta.progress import Event, Progress, silent
from kilodelta.verify.parity.cases import live
from kilodelta.verify.parity.metrics import compare
from kilodelta.verify.parity.result import Agreement, Closeness
from kilodelta.verify.runners.runner import Arrays, Batch
from kilodelta.verify.runners.torch_runner import TorchRunner

_Part = tuple[int, Closeness, Closeness]
"""Rows of a batch, and how close merged model and base come on them."""


def agreement(
    models: Mapping[str, torch.nn.Module],
    *,
    outputs: Sequence[str],
    scores: Sequence[str],
    batches: Sequence[Batch],
    device: str = "cpu",
    progress: Progress = silent,
) -> tuple[Agreement, ...]:
    """Run three models in float32 on every batch and compare two with the tuned one.

    Padding is left out.

    Args:
        models: `tuned`, `merged` and `base`, each taking named tensors.
        outputs: names of the outputs to compare.
        scores: those of them that are class scores along the last axis.
        batches: all inputs.
        device: where torch computes, "cpu" or "cuda".
        progress: called per batch.

    Raises:
        InputError: the tuned model's outputs are others, or have other shapes.
    """
    runners = {
        name: TorchRunner(module, outputs, precision="float32", device=device)
        for name, module in models.items()
    }
    parts: dict[str, list[_Part]] = {name: [] for name in outputs}
    for done, batch in enumerate(batches, 1):
        results = {name: runner.run(batch) for name, runner in runners.items() if name != "tuned"}
        results["tuned"] = _tuned(runners["tuned"], batch, results["merged"])
        for name in outputs:
            rows = {model: _rows(arrays[name], batch) for model, arrays in results.items()}
            to_merged, to_base = (
                _close(rows[model], rows["tuned"], name in scores) for model in ("merged", "base")
            )
            parts[name].append((len(rows["tuned"]), to_merged, to_base))
        progress(Event(stage="agreement", done=done, total=len(batches), unit="batches"))
    return tuple(_whole(name, batch_parts) for name, batch_parts in parts.items())


def _tuned(runner: TorchRunner, batch: Batch, merged: Arrays) -> Arrays:
    fix = "give the tuned model that the file was compressed from"
    try:
        results = runner.run(batch)
    except KiloDeltaError as error:
        raise InputError(f"the model of --against: {error.what}", fix=fix) from error
    for name, array in results.items():
        if array.shape != merged[name].shape:
            raise InputError(
                f"the model of --against puts out {name} of shape {array.shape}, the merged "
                f"model {merged[name].shape}",
                fix=fix,
            )
    return results


def _rows(output: NDArray[Any], batch: Batch) -> NDArray[Any]:
    live_rows = live(output, batch)
    return live_rows.reshape(-1, live_rows.shape[-1] if live_rows.ndim > 1 else 1)


def _close(actual: NDArray[Any], tuned: NDArray[Any], classes: bool) -> Closeness:
    metrics = compare(actual, tuned, classes=classes)
    return Closeness(top1=metrics.top1, cosine=metrics.cosine, kl=metrics.kl)


def _whole(name: str, parts: Sequence[_Part]) -> Agreement:
    counts = [count for count, _, _ in parts]
    return Agreement(
        output=name,
        rows=sum(counts),
        merged=_mean([merged for _, merged, _ in parts], counts),
        base=_mean([base for _, _, base in parts], counts),
    )


def _mean(parts: Sequence[Closeness], counts: Sequence[int]) -> Closeness:
    """Average over all rows: every number is a mean over the rows of its part."""

    def mean(values: Sequence[float | None]) -> float | None:
        stated = [value for value in values if value is not None]
        return float(np.average(stated, weights=counts)) if stated and sum(counts) else None

    cosine = mean([part.cosine for part in parts])
    return Closeness(
        top1=mean([part.top1 for part in parts]),
        cosine=1.0 if cosine is None else cosine,
        kl=mean([part.kl for part in parts]),
    )
