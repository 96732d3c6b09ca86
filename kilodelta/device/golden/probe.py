"""The probe decides: what was just built must compute the fine-tune, or it is never served.

Three questions, with the device's runtime: are the outputs on the bundle's golden inputs finite,
except where the model means infinity? Is the update present, so that they are not the base's? And
if the file brings golden values: are its outputs within the limits that it states for this
precision?
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

_FIX = (
    "what was served before goes on; where kilodelta status FOLDER --check finds the folder whole,"
    " send the file's maker this message"
)

Run = Callable[[Batch], Arrays]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a probe saw; empty if the file has no golden values for this precision.

    Attributes:
        errors: by output, the error against the file's golden values.
        limits: by output, what the file admits.
    """

    errors: Mapping[str, Metrics] = field(default_factory=dict)
    limits: Mapping[str, Limit] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return error and limit by output."""
        return {
            name: {
                "relative_l2": error.relative_l2,
                "relative_max": error.relative_max,
                "limit": self.limits[name].to_json(),
            }
            for name, error in self.errors.items()
        }


def probe(
    run: Run, delta: Delta, inputs: Arrays, base: Arrays, dtype: str, way: str = golden.MERGED
) -> Seen:
    """Compare a fine-tune that was just built with all that is known about it.

    Args:
        run: computes outputs with it.
        delta: its file.
        inputs: the bundle's golden inputs.
        base: what this device's base gives on them.
        dtype: the precision it computes in.
        way: how the fine-tune was applied, as `golden.way_of` says.

    Raises:
        ProofError: naming the output and what is wrong with it.
    """
    own, limits = golden.of_delta(delta, way), golden.limits_of(delta, dtype, way)
    outputs = run(inputs)
    stated = own.outputs if own is not None and limits else {}
    require_finite(outputs, inputs, base, {name: stated[name] for name in limits if name in stated})
    if _same(outputs, base) and _changes(delta):
        raise ProofError("the outputs are the base's: the update is not there", fix=_FIX)
    if own is None or not limits:
        return Seen()
    return require_close(run(own.inputs), own, limits)


def require_finite(
    outputs: Arrays,
    inputs: Batch,
    expected: Arrays,
    stated: Arrays | None = None,
) -> None:
    """Check that outputs are finite, padding aside, except where the model means otherwise.

    A model may mask scores with minus infinity, or give NaN for rows that are masked whole. So NaN
    and infinity are right where the expected outputs hold the same, and an infinity is right
    anywhere in an output whose stated golden values hold it: there they are compared one by one.

    Args:
        outputs: by name.
        inputs: what they were computed from.
        expected: what the base gives on the same inputs.
        stated: golden values that a file brings for other inputs, and is compared with.

    Raises:
        ProofError: naming an output that holds NaN or infinity.
    """
    for name, array in outputs.items():
        if array.dtype.kind != "f":
            continue
        values = live(array, inputs)
        right = np.isfinite(values)
        if name in expected and expected[name].shape == array.shape:
            base = live(expected[name], inputs)
            right |= (values == base) | (np.isnan(values) & np.isnan(base))
        for infinity in (np.inf, -np.inf):
            if stated and name in stated and (stated[name] == infinity).any():
                right |= values == infinity
        if not right.all():
            raise ProofError(f"output {name} holds NaN or infinity", fix=_FIX)


def require_close(outputs: Arrays, known: Golden, limits: Mapping[str, Limit]) -> Seen:
    """Check that outputs are within their limits.

    Args:
        outputs: the outputs by name.
        known: the inputs that they were computed from, and the outputs they must be close to.
        limits: by output, how close.

    Raises:
        ProofError: naming an output that is missing or too far off, with error and limit.
    """
    errors = {name: _error(name, outputs, known) for name in limits}
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


def _error(name: str, outputs: Arrays, known: Golden) -> Metrics:
    if name not in outputs or name not in known.outputs:
        raise ProofError(f"there is no output {name}; there are {', '.join(outputs)}", fix=_FIX)
    actual, wanted = live(outputs[name], known.inputs), live(known.outputs[name], known.inputs)
    return compare(actual, wanted)


def _same(outputs: Arrays, base: Arrays) -> bool:
    """Return whether all outputs are equal. NaN equals NaN, or one of them would hide the base."""
    return outputs.keys() == base.keys() and all(
        np.array_equal(array, base[name], equal_nan=array.dtype.kind == "f")
        for name, array in outputs.items()
    )


def _changes(delta: Delta) -> bool:
    """Return whether a file changes anything: a coefficient is not zero, or it has extras."""
    return bool(delta.blob.any()) or bool(delta.extras)
