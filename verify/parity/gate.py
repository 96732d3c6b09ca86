"""Decide how large an error may be: a multiple of what plain torch shows in the same precision.

Why four times. Two correct programs for one model round at different places. A runtime may round
up to 16 times where torch rounds once: GELU, softmax or layer norm written out in elementary ONNX
operators take 5 to 12 roundings, torch's fused kernels one. Independent roundings add in
quadrature, so the error grows by at most sqrt(16) = 4. Real faults lie outside: the next coarser
precision rounds 8 times (float16 to bfloat16) or 8192 times (float32 to float16, or TF32) as
coarsely, so an artefact that is less precise than it claims fails as well.

Why a floor. On small models torch may round exactly by luck. Every output is rounded at least once,
by the unit roundoff u at most, so 4 u is allowed in any case. For the same reason the yardstick is
torch's largest error over the cases, not the error of one small case.

Why a spread. Torch's own error is the size of the model's roundings times luck. For an output of
one number, or one whose error comes from one near cancellation, another program has other luck.
So where an artefact is beyond the limit, the reference is computed in float64 several times more,
each time with what products and sums take in off by as many roundings as said above
(`kilodelta.verify.runners.rounding_noise`). What that does to the outputs is what rounding can do
to this model on these inputs, and the same multiple of it is admitted, case by case. Where torch
had no such luck, it is about as large as torch's error (measured: 0.6 to 2 times), so little is
loosened there. The second largest of the runs counts, so that one run in which the near tie of a
router falls otherwise excuses nothing.

Why a cap. Where the precision does not carry the model (a norm whose sum overflows float16 and
divides everything by infinity), torch's error is as large as the output, and four times that would
admit anything. So nothing excuses more than `MOST`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from kilodelta.verify.parity.metrics import Metrics, Number, jsonable
from kilodelta.verify.runners.runner import UNIT_ROUNDOFF

MULTIPLE = 4.0
MOST = 0.1
"""The largest relative error that is ever admitted. In bfloat16, the coarsest precision here, deep
models are off by 1 to 3 percent; what is off by a tenth is another model."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The largest admitted `relative_l2` and `relative_max` of an output."""

    relative_l2: float
    relative_max: float

    def admits(self, error: Metrics) -> bool:
        """Return whether both errors are within.

        Example:
            >>> import numpy as np
            >>> from kilodelta.verify.parity.metrics import compare
            >>> error = compare(np.array([1.0, 0.001]), np.array([1.0, 0.0]))
            >>> Limit(relative_l2=0.01, relative_max=0.01).admits(error)
            True
        """
        within_l2 = error.relative_l2 <= self.relative_l2
        return within_l2 and error.relative_max <= self.relative_max

    def to_json(self) -> dict[str, Number]:
        """Return the two limits by name."""
        return {name: jsonable(value) for name, value in asdict(self).items()}


def limit(plain: Iterable[Metrics], precision: str) -> Limit:
    """Return the limit of one output.

    Args:
        plain: plain torch's errors in `precision`, one per case.
        precision: `float64`, `float32`, `float16` or `bfloat16`.
    """
    errors = tuple(plain)
    return Limit(
        relative_l2=_most((error.relative_l2 for error in errors), precision),
        relative_max=_most((error.relative_max for error in errors), precision),
    )


def widened(limit: Limit, spread: Sequence[Metrics]) -> Limit:
    """Return a limit that admits the same multiple of what rounding noise does to the output.

    Args:
        limit: what torch's own errors admit.
        spread: the errors of several runs with noise; the second largest of each kind counts.

    Example:
        >>> import numpy as np
        >>> from kilodelta.verify.parity.metrics import compare
        >>> noisy = [compare(np.array([1.0 + e]), np.ones(1)) for e in (0.0, 2e-6, 1e-6, 1e-3)]
        >>> print(f"{widened(limit([], 'float32'), noisy).relative_l2:.1g}")
        8e-06
    """
    return Limit(
        relative_l2=max(limit.relative_l2, _second(run.relative_l2 for run in spread)),
        relative_max=max(limit.relative_max, _second(run.relative_max for run in spread)),
    )


def _second(errors: Iterable[float]) -> float:
    """Multiply the second largest error of the runs; 0 where that is not finite."""
    largest = sorted(errors)[-2:]
    return min(MOST, MULTIPLE * largest[0]) if largest and math.isfinite(largest[0]) else 0.0


def carries(plain: Iterable[Metrics]) -> bool:
    """Return whether these errors, plain torch's in one precision, are all within `MOST`."""
    return all(max(error.relative_l2, error.relative_max) <= MOST for error in plain)


def _most(errors: Iterable[float], precision: str) -> float:
    """Multiply the largest finite error: torch's own NaN or infinity excuses nothing."""
    # The roundoff is the floor, because torch may be exact by luck on small models.
    finite = (error for error in errors if math.isfinite(error))
    return min(MOST, MULTIPLE * max(UNIT_ROUNDOFF[precision], *finite, 0.0))
