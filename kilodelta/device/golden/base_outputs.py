"""Compute what this device's base puts out on the golden inputs, and remember it.

It is compared with the golden outputs once, so that the base is known to work here. A fine-tune
whose outputs are these very bits is not present. Bits differ from machine to machine, so what is
remembered counts only where runtime, processor, cores and GPU are the same: a device folder may
have been cloned from another machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.golden import golden
from kilodelta.device.golden.computer import computer
from kilodelta.device.golden.probe import require_close, require_finite
from kilodelta.device.modes.interface import Mode
from kilodelta.errors import InputError, ProofError
from kilodelta.files import npz, plain
from kilodelta.verify.runners.runner import Arrays

_COMPUTER = "runtime"
"""The entry that says what computed the outputs; releases before 0.2 wrote the runtime alone."""


def device_base(folder: DeviceFolder, mode: Mode, reference: golden.Golden) -> Arrays:
    """Return the base's outputs on the golden inputs, as this device computes them.

    Args:
        folder: remembers them.
        mode: computes them.
        reference: the golden inputs and outputs.

    Raises:
        ProofError: the base does not give the golden outputs on this device.
        OutputError: they cannot be remembered.
    """
    here = computer(mode.runtime)
    remembered = _read(folder.remembered, here)
    if remembered is not None:
        return remembered
    outputs = mode.open(None).run(reference.inputs)
    try:
        require_finite(outputs, reference.inputs, reference.outputs)
        require_close(outputs, reference, folder.bundle.limits)
    except ProofError as problem:
        raise ProofError(
            f"the base itself is wrong on this device: {problem.what}",
            fix="bundle it for this device's runtime, or in float32; see kilodelta doctor",
        ) from None
    named = {golden.OUTPUT + name: array for name, array in outputs.items()}
    # As bytes: an .npz file of plain numbers holds no texts.
    stated = np.frombuffer(here.encode(), np.uint8)
    npz.write_npz(folder.remembered, {_COMPUTER: stated, **named})
    return outputs


def _read(path: Path, here: str) -> Arrays | None:
    """Return what is remembered of this very computer, or None."""
    if not plain.is_file(path):
        return None
    try:
        arrays = npz.read_modest(path)
    except InputError:
        return None
    stated = arrays.pop(_COMPUTER, np.empty(0, np.uint8))
    if stated.dtype != np.uint8 or stated.tobytes() != here.encode():
        return None
    return {name.removeprefix(golden.OUTPUT): array for name, array in arrays.items()}
