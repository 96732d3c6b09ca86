"""Every kind of file that a stranger may have made: one row each, read as commands read it."""

from collections.abc import Mapping

from tests.fuzz.harness import Surface
from tests.fuzz.surfaces import (
    adapters,
    devices,
    exports,
    fleets,
    inputs,
    models,
    quantised,
    releases,
)

SURFACES: Mapping[str, Surface] = {
    surface.name: surface
    for room in (models, quantised, exports, devices, inputs, adapters, releases, fleets)
    for surface in room.SURFACES
}
"""All surfaces by name."""
