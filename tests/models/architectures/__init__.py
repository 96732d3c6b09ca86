"""A table of tiny architectures of transformers: class, configuration, and inputs at three sizes.

Plain modules of torch follow them, in the same columns.

Every entry builds from its configuration, with random weights, in a fraction of a second. Sizes
are as small as the architecture allows, never square where that could hide a transpose.
"""

from __future__ import annotations

from tests.models.architectures import (
    decoders,
    encoders,
    modules,
    multimodal,
    several,
    speech,
    vision,
)
from tests.models.architectures.architecture import Architecture as Architecture
from tests.models.architectures.architecture import Batch as Batch

TABLE: tuple[Architecture, ...] = (
    *encoders.ROWS,
    *decoders.ROWS,
    *vision.ROWS,
    *speech.ROWS,
    *several.ROWS,
    *multimodal.ROWS,
    *modules.ROWS,
)
