"""Write ONNX Runtime's own adapter files (`.onnx_adapter`): factors in the form that it maps.

Any program with ONNX Runtime 1.20 or newer loads one and names it in a run's options; it needs no
kilodelta. The graph must have been exported with `optional`, so that its factors may be left out
of the feeds. Adapter files do not work with IOBinding; there, bind the factors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kilodelta.errors import InputError, require
from kilodelta.export.adapter.factors import expand
from kilodelta.export.adapter.layout import AdapterLayout
from kilodelta.files import staging
from kilodelta.format.delta import Delta
from kilodelta.progress import Progress, silent


def write_adapter(
    delta: Delta,
    layout: AdapterLayout,
    path: Path,
    *,
    version: int = 1,
    progress: Progress = silent,
) -> int:
    """Write a delta as an `.onnx_adapter` file, in full or not at all; return its bytes.

    Args:
        delta: the fine-tune; needs no base.
        layout: of the graph that it is for.
        path: a new file.
        version: a number of your own, which the file carries.
        progress: called with how far the work is.

    Raises:
        InputError: the graph has slots or required factors, or cannot take this delta.
        BaseMismatchError, FileError: as `expand`.
        MissingPackageError: ONNX Runtime is not installed.
        OutputError: `path` exists, or cannot be written.
    """
    if layout.slots or not layout.optional or layout.dtype == "bfloat16":
        raise InputError(
            "adapter files need a graph with optional factors of float32 or float16, without slots",
            fix="export the graph with optional=True, or bind the factors as inputs",
        )
    ort = require("onnxruntime", extra="cpu", why="write adapter files")
    factors = expand(delta, layout, progress=progress)
    made = ort.AdapterFormat()
    made.set_adapter_version(version)
    made.set_model_version(1)
    made.set_parameters(
        {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(values))
            for name, values in factors.items()
        }
    )
    with staging.new_file(path, replace=False) as stage:
        made.export_adapter(str(stage))
        return stage.stat().st_size
