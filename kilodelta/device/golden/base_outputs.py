"""What this device's own base computes on the golden inputs, in this device's own runtime.

It is computed once, held against the golden outputs (so that the base is known to work here), and
remembered until the runtime changes. A fine-tune whose outputs are these very numbers is not there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.golden import golden
from kilodelta.device.golden.probe import require_close, require_finite
from kilodelta.device.modes.interface import Mode
from kilodelta.errors import InputError, ProofError
from kilodelta.files import npz, plain
from kilodelta.verify.runners.runner import Arrays

_RUNTIME = "runtime"


def device_base(folder: DeviceFolder, mode: Mode, known: golden.Golden) -> Arrays:
    """Return the base's outputs on the golden inputs, as this device computes them.

    Args:
        folder: remembers them.
        mode: computes them.
        known: the golden inputs and outputs.

    Raises:
        ProofError: the base does not give the golden outputs on this device.
        OutputError: they cannot be remembered.
    """
    remembered = _read(folder.remembered, mode.runtime)
    if remembered is not None:
        return remembered
    outputs = mode.open(None).run(known.inputs)
    try:
        require_finite(outputs, known.inputs)
        require_close(outputs, known, folder.bundle.limits)
    except ProofError as problem:
        raise ProofError(
            f"the base itself is wrong on this device: {problem.what}",
            fix="bundle it for this device's runtime, or in float32; see kilodelta doctor",
        ) from None
    named = {golden.OUTPUT + name: array for name, array in outputs.items()}
    # As bytes: an .npz file of plain numbers holds no texts.
    version = np.frombuffer(mode.runtime.encode(), np.uint8)
    npz.write_npz(folder.remembered, {_RUNTIME: version, **named})
    return outputs


def _read(path: Path, runtime: str) -> Arrays | None:
    """What is remembered from the same runtime, or None."""
    if not plain.is_file(path):
        return None
    try:
        arrays = npz.read_modest(path)
    except InputError:
        return None
    version = arrays.pop(_RUNTIME, np.empty(0, np.uint8))
    if version.dtype != np.uint8 or version.tobytes() != runtime.encode():
        return None
    return {name.removeprefix(golden.OUTPUT): array for name, array in arrays.items()}
