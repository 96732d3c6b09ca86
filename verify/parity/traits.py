"""Learn about a model by trying it: how long its inputs may be, and how its rows and tokens depend.

Configurations state limits in many ways (RoBERTa's positions begin after the padding index, CLIP
and Whisper have two towers) and modules of a user state none. A forward pass tells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kilodelta.errors import InputError
from kilodelta.verify.parity.fitting import MASK, Padding, Shapes, fit
from kilodelta.verify.runners.runner import Batch
from kilodelta.verify.runners.torch_runner import TorchRunner

_TOKENS = 8
"""Tokens of a row by which `reads_left_to_right` tells decoders from encoders."""
_BRIEF = 0.5
"""Seconds of a pass below which it is timed twice."""
_SAME = 1e-3
"""Relative difference up to which two float32 results are the same computation."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one forward pass takes in float32.

    Attributes:
        elements: of all outputs together.
        seconds: of the pass.
        inputs: elements of all inputs together.
    """

    elements: int
    seconds: float
    inputs: int


class Trial:
    """A model and real inputs to try it on, in float32 on a CPU.

    On a GPU an index beyond a position table would end the process's CUDA context.

    Attributes:
        padding: how inputs are brought to a shape, as `fit` takes it.
    """

    def __init__(self, module: torch.nn.Module, outputs: Sequence[str], batch: Batch) -> None:
        self._runner = TorchRunner(module, outputs, precision="float32", device="cpu")
        self._batch = batch
        self.padding: Padding = "none"

    def cost(self, shapes: Shapes) -> Cost:
        """Compute a batch of these shapes.

        Raises:
            InputError: the model cannot compute it.
        """
        inputs = fit(self._batch, shapes, padding=self.padding)
        began = time.perf_counter()
        outputs = self._runner.run(inputs)
        seconds = time.perf_counter() - began
        if seconds < _BRIEF:  # a first pass allocates and compiles: time another
            began = time.perf_counter()
            self._runner.run(inputs)
            seconds = min(seconds, time.perf_counter() - began)
        return Cost(
            elements=sum(array.size for array in outputs.values()),
            seconds=seconds,
            inputs=sum(array.size for array in inputs.values()),
        )

    def rows_are_independent(self, shapes: Shapes) -> bool:
        """Return whether a row's outputs stay the same when other rows are computed beside it.

        Similarities between the rows of a batch, as CLIP's logits are, are not.

        Args:
            shapes: by input; two rows of them are computed.
        """
        two = {name: (2, *shape[1:]) for name, shape in shapes.items()}
        inputs = fit(self._batch, two, padding=self.padding)
        try:
            together = self._runner.run(inputs)
            apart = [
                self._runner.run({name: array[row : row + 1] for name, array in inputs.items()})
                for row in range(2)
            ]
        except InputError:  # one row only, or two at least
            return False
        return all(
            array.ndim > 0
            and array.shape == (2, *apart[0][name].shape[1:])
            and _close(array, np.concatenate([part[name] for part in apart]))
            for name, array in together.items()
        )

    def reads_left_to_right(self) -> bool:
        """Return whether the model is a decoder: earlier outputs do not see the last token."""
        if MASK not in self._batch or self._batch[MASK].shape[1] < 2:
            return False
        length = min(_TOKENS, self._batch[MASK].shape[1])
        rows = len(self._batch[MASK])
        shapes = {
            name: (rows, length, *array.shape[2:])
            if array.shape[:2] == self._batch[MASK].shape
            else array.shape
            for name, array in self._batch.items()
        }
        inputs = fit(self._batch, shapes, padding="none")
        other = {name: _last_changed(name, array, length) for name, array in inputs.items()}
        try:
            before, after = self._runner.run(inputs), self._runner.run(other)
        except InputError:
            return False
        pairs = [
            (before[name][:, :-1], after[name][:, :-1])
            for name in before
            if before[name].ndim >= 3 and before[name].shape[:2] == (rows, length)
        ]
        return bool(pairs) and all(_close(a, b) for a, b in pairs)


def longest(works: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number up to `high` that works, given that `low` does.

    Args:
        works: true up to some number and false from there on.
        low: a number that works.
        high: the largest to try.

    Example:
        >>> longest(lambda n: n <= 62, 1, 512)
        62
    """
    while low < high:
        middle = (low + high + 1) // 2
        if works(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _close(a: NDArray[Any], b: NDArray[Any]) -> bool:
    with np.errstate(invalid="ignore"):
        return bool(np.allclose(a, b, rtol=_SAME, atol=_SAME * _scale(a), equal_nan=True))


def _scale(array: NDArray[Any]) -> float:
    values = np.abs(array[np.isfinite(array)]) if array.dtype.kind == "f" else np.zeros(0)
    return float(values.max()) if values.size else 0.0


def _last_changed(name: str, array: NDArray[Any], length: int) -> NDArray[Any]:
    """Give token ids another last token; return any other input unchanged."""
    if name == MASK or "position" in name or "type" in name:
        return array
    if array.ndim != 2 or array.shape[1] != length or array.dtype.kind not in "iu":
        return array
    changed = array.copy()
    changed[:, -1] = array[:, 0]
    same = changed[:, -1] == array[:, -1]
    changed[same, -1] = array[same, -1] + np.where(array[same, -1] > 0, -1, 1)
    return changed
