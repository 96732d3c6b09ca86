"""The probe decides: what was just built must compute the fine-tune, or it is never served.

Three questions, with the device's own runtime: are the outputs on the bundle's golden inputs finite
numbers? Is the update there, so that they are not the base's? And if the file brings golden values:
are its outputs within the limits that it states for this precision?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kilodelta.device.golden import golden
from kilodelta.device.golden.golden import Golden
from kilodelta.errors import ProofError
from kilodelta.format.delta import Delta
from kilodelta.verify.parity.cases import live
from kilodelta.verify.parity.gate import Limit
from kilodelta.verify.parity.metrics import Metrics, compare
from kilodelta.verify.runners.runner import Arrays, Batch

_FIX = "what was served before goes on; send the file's maker this message"

Run = Callable[[Batch], Arrays]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a probe saw: by output the error against the file's golden values and the limit.

    Empty where the file has no golden values for this precision; then the outputs were only seen to
    be finite and not the base's.
    """

    errors: Mapping[str, Metrics] = field(default_factory=dict)
    limits: Mapping[str, Limit] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            name: {
                "relative_l2": error.relative_l2,
                "relative_max": error.relative_max,
                "limit": self.limits[name].to_json(),
            }
            for name, error in self.errors.items()
        }


def probe(run: Run, delta: Delta, inputs: Arrays, base: Arrays, dtype: str) -> Seen:
    """Hold a fine-tune that was just built against all that is known about it.

    Args:
        run: computes outputs with it.
        inputs: the bundle's golden inputs.
        base: what this device's base gives on them.
        dtype: the precision it computes in.

    Raises:
        ProofError: naming the output and what is wrong with it.
    """
    found = run(inputs)
    require_finite(found, inputs)
    if _same(found, base) and _changes(delta):
        raise ProofError("the outputs are the base's: the update is not there", fix=_FIX)
    own, limits = golden.of_delta(delta), golden.limits_of(delta, dtype)
    if own is None or not limits:
        return Seen()
    return require_close(run(own.inputs), own, limits)


def require_finite(outputs: Arrays, inputs: Batch) -> None:
    """See that outputs are numbers, padding aside.

    Raises:
        ProofError: naming an output that holds NaN or infinity.
    """
    for name, array in outputs.items():
        if not np.isfinite(live(array, inputs)).all():
            raise ProofError(f"output {name} holds NaN or infinity", fix=_FIX)


def require_close(found: Arrays, known: Golden, limits: Mapping[str, Limit]) -> Seen:
    """See that outputs are within their limits.

    Raises:
        ProofError: naming an output that is missing or too far off, with error and limit.
    """
    errors = {name: _error(name, found, known) for name in limits}
    for name, error in errors.items():
        most = limits[name]
        if not most.admits(error):
            raise ProofError(
                f"output {name} is off: relative L2 {error.relative_l2:.2g} (at most "
                f"{most.relative_l2:.2g}), relative maximum {error.relative_max:.2g} (at most "
                f"{most.relative_max:.2g})",
                fix=_FIX,
            )
    return Seen(errors=errors, limits=limits)


def _error(name: str, found: Arrays, known: Golden) -> Metrics:
    if name not in found or name not in known.outputs:
        raise ProofError(f"there is no output {name}; there are {', '.join(found)}", fix=_FIX)
    actual, wanted = live(found[name], known.inputs), live(known.outputs[name], known.inputs)
    return compare(actual, wanted)


def _same(found: Arrays, base: Arrays) -> bool:
    return found.keys() == base.keys() and all(np.array_equal(found[n], base[n]) for n in found)


def _changes(delta: Delta) -> bool:
    """Whether a file changes anything: not all of its coefficients are zero, or it has extras."""
    return bool(delta.blob.any()) or bool(delta.extras)
