"""What artefacts are held against: merged model and base in float64, and plain torch's own errors.

An artefact may be off as far as `kilodelta.verify.parity.gate` allows after looking at plain torch
in the artefact's precision, and it has to show the fine-tune's effect on at least one output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kilodelta.errors import KiloDeltaError, ProofError
from kilodelta.progress import Event, Progress, silent
from kilodelta.verify.parity.cases import LEFT, Case, live, refilled, token_axis
from kilodelta.verify.parity.metrics import (
    BLOCK,
    NO_REFERENCE,
    Float64,
    Metrics,
    are_all_nan,
    compare,
    finite,
)
from kilodelta.verify.runners.rounding_noise import noisy_runs
from kilodelta.verify.runners.runner import UNIT_ROUNDOFF, Arrays
from kilodelta.verify.runners.torch_runner import TorchRunner

_NOISE = 2.0**-40
"""Relative change below which two float64 results are equal: a few thousand roundings."""

_COARSEST = "bfloat16"
"""The precision that decides which integers are clear (`Reference._clear`)."""


class Reference:
    """Outputs of merged model and base on every case in float64.

    Args:
        merged: the merged model, taking named tensors.
        base: the base in the same architecture.
        outputs: names of the outputs to compare.
        scores: those of them that are class scores along the last axis.
        cases: the inputs.
        device: where torch computes, "cpu" or "cuda".
        rows: rows per forward pass, for a model whose rows do not depend on each other; None
            computes a case at once.
        progress: called as cases are computed.

    Attributes:
        undefined: outputs that the model itself takes from padded positions where padding is on the
            left, so that they are not compared there.

    Raises:
        ProofError: merged and base give the same outputs, so no artefact could show the update; or
            nothing but NaN.
        InputError: the model cannot compute a case.
    """

    def __init__(
        self,
        merged: torch.nn.Module,
        base: torch.nn.Module,
        *,
        outputs: Sequence[str],
        scores: Sequence[str] = (),
        cases: Sequence[Case],
        device: str = "cpu",
        rows: int | None = None,
        progress: Progress = silent,
    ) -> None:
        self.outputs, self.scores = tuple(outputs), frozenset(scores)
        self.cases, self._module, self._device = tuple(cases), merged, device
        self._rows, self._progress = rows, progress
        self._plain: dict[tuple[str, bool], dict[str, tuple[Metrics, ...]]] = {}
        self._clear_places: dict[str, list[NDArray[np.bool_]]] = {}
        self.merged = self._run(merged, "float64", "merged model")
        if are_all_nan(self.merged):
            raise ProofError(NO_REFERENCE[0], fix=NO_REFERENCE[1])
        self.base = self._run(base, "float64", "base")
        lengths = [case.length for case in self.cases]
        self._axes = {
            name: token_axis([arrays[name].shape for arrays in self.merged], lengths)
            for name in self.outputs
        }
        self.undefined = self._taken_from_padding()
        self._effects = {name: self._effect(name) for name in self.outputs}
        if not any(self._effects[name] or self._is_torn(name) for name in self.outputs):
            raise ProofError(
                "the base and the merged model give the same outputs on these inputs",
                fix="give inputs of the task that the delta was made for",
            )

    def plain(self, precision: str, *, in_order: bool = False) -> dict[str, tuple[Metrics, ...]]:
        """Return plain torch's errors in a precision: by output, one per case.

        Args:
            precision: `float32`, `float16` or `bfloat16`.
            in_order: let torch add the terms of long sums one after another.

        Raises:
            UnavailableError: torch cannot compute the model in this precision here.
        """
        key = (precision, in_order)
        if key not in self._plain:
            results = self._run(self._module, precision, "merged model", in_order=in_order)
            self._plain[key] = self.errors(results)
        return self._plain[key]

    def spread(self, case: Case, precision: str) -> dict[str, tuple[Metrics, ...]]:
        """Return what rounding noise does to each output in a case: one error per noisy run.

        Integers are left out: they have no rounding (`_clear` says which of them count).

        Args:
            case: one of `cases`.
            precision: whose rounding is imitated.
        """
        at = next(i for i, other in enumerate(self.cases) if other is case)
        named = [name for name in self.outputs if not self._is_discrete(name)]
        runner = TorchRunner(self._module, named, precision="float64", device=self._device)
        runs = noisy_runs(runner, case.batch, precision, rows=self._rows)

        def errors(name: str) -> Iterator[Metrics]:
            exact, axis = (
                live(self.merged[at][name], case.batch, self._axes[name]),
                self._axes[name],
            )
            for run in runs:
                yield compare(live(run[name], case.batch, axis), exact)

        return {name: tuple(errors(name)) for name in named}

    def errors(self, results: Sequence[Arrays]) -> dict[str, tuple[Metrics, ...]]:
        """Return by output the errors of an artefact's results, one per case."""
        return {name: tuple(self._compare(name, results)) for name in self.outputs}

    def update(self, results: Sequence[Arrays], precision: str) -> dict[str, float]:
        """Return by output the share of the fine-tune's effect that an artefact's results show.

        The results' change from the base is projected on the merged model's change: 1 at the merged
        model, 0 at the base, and above 1/2 exactly where the merged model is the nearer one. Only
        outputs that can tell in spite of the results' rounding are in it, so it may be empty.

        Args:
            results: one `Arrays` per case.
            precision: the artefact's.
        """
        shares = {name: self._share(name, results, precision) for name in self.outputs}
        stated = {name: share for name, share in shares.items() if share is not None}
        continuous = {n: share for n, share in stated.items() if not self._is_discrete(n)}
        # A label flips where two scores nearly tie, so scores tell better where there are any.
        return continuous or stated

    def _run(
        self, module: torch.nn.Module, precision: str, what: str, *, in_order: bool = False
    ) -> tuple[Arrays, ...]:
        runner = TorchRunner(
            module, self.outputs, precision=precision, device=self._device, in_order=in_order
        )
        total = sum(len(next(iter(case.batch.values()))) for case in self.cases)
        before = 0
        results = []
        for case in self.cases:
            shape = "x".join(map(str, case.shape))

            def done(count: int, before: int = before, shape: str = shape) -> None:
                event = Event(
                    stage=f"reference {precision}",
                    done=before + count,
                    total=total,
                    unit="rows",
                    detail={"model": what, "shape": shape},
                )
                self._progress(event)

            results.append(runner.run(case.batch, rows=self._rows, done=done))
            before += len(next(iter(case.batch.values())))
        return tuple(results)

    def _is_discrete(self, name: str) -> bool:
        return self.merged[0][name].dtype.kind in "iub"

    def is_defined(self, name: str, case: Case) -> bool:
        """Return whether an output is compared in a case (see `undefined`)."""
        return case.name != LEFT or name not in self.undefined

    def _live(self, name: str, results: Sequence[Arrays]) -> list[NDArray[Any]]:
        """Return what is compared of an output: per case its entries (positions, ...)."""
        return [
            live(result[name], case.batch, self._axes[name])
            if self.is_defined(name, case)
            else result[name][:0]
            for result, case in zip(results, self.cases, strict=True)
        ]

    def _taken_from_padding(self) -> frozenset[str]:
        """Find the outputs without an axis of tokens that change with what left padding holds."""
        at = next((i for i, case in enumerate(self.cases) if case.name == LEFT), None)
        if at is None:
            return frozenset()
        batch, before = self.cases[at].batch, self.merged[at]
        pooled = [n for n in self.outputs if live(before[n], batch, self._axes[n]) is before[n]]
        if not pooled:
            return frozenset()
        runner = TorchRunner(self._module, pooled, precision="float64", device=self._device)
        after = runner.run(refilled(batch), rows=self._rows)
        return frozenset(n for n in pooled if compare(after[n], before[n]).relative_l2 > _NOISE)

    def _compare(self, name: str, results: Sequence[Arrays]) -> list[Metrics]:
        actual, reference = self._live(name, results), self._live(name, self.merged)
        if self._is_discrete(name):
            clear = self._clear(name)
            _require_shapes(actual, reference)
            actual, reference = _at(actual, clear), _at(reference, clear)
        classes = name in self.scores
        return [compare(a, r, classes=classes) for a, r in zip(actual, reference, strict=True)]

    def _clear(self, name: str) -> list[NDArray[np.bool_]]:
        """Mark where an integer does not hang on rounding: the coarsest precision gives the same.

        The largest of two nearly equal scores is either one, in any correct program.
        """
        if name not in self._clear_places:
            reference = self._live(name, self.merged)
            try:
                coarse = self._live(name, self._run(self._module, _COARSEST, "merged model"))
            except KiloDeltaError:  # torch cannot compute in it: then every element counts
                coarse = reference
            self._clear_places[name] = [a == r for a, r in zip(coarse, reference, strict=True)]
        return self._clear_places[name]

    def _effect(self, name: str) -> float:
        """Measure the fine-tune's effect: the norm of the change, or the elements that differ.

        0 where there is none beyond float64's own rounding.
        """
        if self._is_discrete(name):
            pairs = zip(self._live(name, self.merged), self._live(name, self.base), strict=True)
            return float(sum(np.count_nonzero(m != b) for m, b in pairs))
        change = size = 0.0
        for merged, base in self._blocks(name, self.merged, self.base):
            change += float(np.sum(np.square(merged - base)))
            size += float(np.sum(np.square(merged)))
        return math.sqrt(change) if change > size * _NOISE**2 else 0.0

    def _is_torn(self, name: str) -> bool:
        """Return whether merged model and base disagree about what is NaN or infinite."""
        pairs = zip(self._live(name, self.merged), self._live(name, self.base), strict=True)
        return any(np.isinf(compare(m, b).max_abs) for m, b in pairs)

    def _share(self, name: str, results: Sequence[Arrays], precision: str) -> float | None:
        """Compute the share of the effect that results show; None where they cannot tell.

        What rounding adds across the effect, it adds along the effect as well: about
        |error| / sqrt(n) of n elements whose errors are independent. Where that is a quarter of the
        effect, a right artefact shows less than half of it, or a base more, once in forty times.
        """
        if not self._effects[name]:
            return None
        if self._is_discrete(name):
            lists = (self._live(name, arrays) for arrays in (results, self.merged, self.base))
            changed = [(a == m)[m != b] for a, m, b in zip(*lists, strict=True)]
            return float(np.concatenate(changed).mean())
        shown = size = error = norm = 0.0
        count = 0
        for actual, merged, base in self._blocks(name, results, self.merged, self.base):
            effect = merged - base
            shown += float(np.sum((actual - base) * effect))
            size += float(np.sum(np.square(effect)))
            error += float(np.sum(np.square(actual - merged)))
            norm += float(np.sum(np.square(merged)))
            count += effect.size
        if not size:
            return None
        share = shown / size
        across = math.sqrt(max(0.0, error - (1.0 - share) ** 2 * size))
        # Storing the output rounds it, even if nothing else has.
        across = max(across, UNIT_ROUNDOFF[precision] * math.sqrt(norm) / 2)
        return share if across <= math.sqrt(count * size) / 4 else None

    def _blocks(self, name: str, *sides: Sequence[Arrays]) -> Iterator[tuple[Float64, ...]]:
        """Yield an output's values of several results as flat float64, some at a time.

        Elements that are not finite on every side are left out: no projection has them.
        """
        for parts in zip(*(self._live(name, side) for side in sides), strict=True):
            flat = [part.reshape(-1) for part in parts]
            for start in range(0, len(flat[0]), BLOCK):
                block = [part[start : start + BLOCK].astype(np.float64) for part in flat]
                usable = np.logical_and.reduce([np.isfinite(values) for values in block])
                usable &= np.logical_and.reduce([finite(values) == values for values in block])
                yield tuple(values[usable] for values in block)


def _require_shapes(actual: Sequence[NDArray[Any]], reference: Sequence[NDArray[Any]]) -> None:
    for a, r in zip(actual, reference, strict=True):
        if a.shape != r.shape:
            compare(a, r)  # raises, naming both shapes


def _at(arrays: Sequence[NDArray[Any]], places: Sequence[NDArray[np.bool_]]) -> list[NDArray[Any]]:
    return [array[place] for array, place in zip(arrays, places, strict=True)]
