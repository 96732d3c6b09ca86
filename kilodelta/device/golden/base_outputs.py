"""What this device's own base computes on the golden inputs, in this device's own runtime.

It is computed once, held against the golden outputs (so that the base is known to work here), and
remembered until the runtime changes. A fine-tune whose outputs are these very numbers is not there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.places import Places
from kilodelta.device.golden import golden
from kilodelta.device.golden.arrays import read_npz, write_npz
from kilodelta.device.golden.probe import require_close, require_finite
from kilodelta.device.modes.interface import Mode
from kilodelta.errors import InputError, ProofError
from kilodelta.verify.runners.runner import Arrays

FILE = "baseline.npz"
_RUNTIME = "runtime"


def device_base(places: Places, bundle: Bundle, mode: Mode, known: golden.Golden) -> Arrays:
    """The base's outputs on the golden inputs, here.

    Raises:
        ProofError: the base does not give the golden outputs on this device.
        OutputError: they cannot be remembered.
    """
    place = places.root / FILE
    remembered = _read(place, mode.runtime)
    if remembered is not None:
        return remembered
    found = mode.open(None).run(known.inputs)
    try:
        require_finite(found, known.inputs)
        require_close(found, known, bundle.limits)
    except ProofError as problem:
        raise ProofError(
            f"the base itself is wrong on this device: {problem.what}",
            fix="bundle it for this device's runtime, or in float32; see kilodelta doctor",
        ) from None
    outputs = {golden.OUTPUT + name: array for name, array in found.items()}
    write_npz(place, {_RUNTIME: np.array(mode.runtime), **outputs})
    return found


def _read(path: Path, runtime: str) -> Arrays | None:
    """What is remembered from the same runtime, or None."""
    try:
        found = read_npz(path)
    except InputError:
        return None
    if str(found.pop(_RUNTIME, None)) != runtime:
        return None
    return {name.removeprefix(golden.OUTPUT): array for name, array in found.items()}
