"""How large an error may be: a multiple of what plain torch shows in the same precision.

Why four times. Two correct programs for one model round at different places. A runtime may round
up to 16 times where torch rounds once: GELU, softmax or layer norm written out in elementary ONNX
operators take 5 to 12 roundings, torch's fused kernels one. Independent roundings add in
quadrature, so the error grows by at most sqrt(16) = 4. What is really wrong lies outside: the next
coarser precision rounds 8 times (float16 to bfloat16) or 8192 times (float32 to float16, or TF32)
as coarsely, so an artefact that is less precise than it claims fails, too.

Why a floor. On small models torch may round exactly by luck. Every output is rounded at least once,
by the unit roundoff u at most, so 4 u is allowed in any case. For the same reason the yardstick is
torch's largest error over the cases, not the error of one small case.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from kilodelta.verify.parity.metrics import Metrics, Number, jsonable
from kilodelta.verify.runners.runner import UNIT_ROUNDOFF

MULTIPLE = 4.0


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The most that an output may be off, as `relative_l2` and as `relative_max`."""

    relative_l2: float
    relative_max: float

    def admits(self, error: Metrics) -> bool:
        """Whether both errors are within."""
        within_l2 = error.relative_l2 <= self.relative_l2
        return within_l2 and error.relative_max <= self.relative_max

    def to_json(self) -> dict[str, Number]:
        """The two limits by name."""
        return {name: jsonable(value) for name, value in asdict(self).items()}


def limit(plain: Iterable[Metrics], precision: str) -> Limit:
    """The limit from plain torch's errors on one output over all cases, in `precision`."""
    errors = tuple(plain)
    return Limit(
        relative_l2=_most((error.relative_l2 for error in errors), precision),
        relative_max=_most((error.relative_max for error in errors), precision),
    )


def _most(errors: Iterable[float], precision: str) -> float:
    """The multiple of the largest finite error: torch's own overflow excuses nothing."""
    finite = (error for error in errors if math.isfinite(error))
    return MULTIPLE * max(UNIT_ROUNDOFF[precision], *finite, 0.0)
