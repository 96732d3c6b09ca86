"""The last step of making a device folder: write down what lies in `base/`, serve the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import kilodelta
from kilodelta.device import bundle as bundles
from kilodelta.device import golden, journal, state
from kilodelta.device.bundle import Bundle
from kilodelta.device.golden import Golden
from kilodelta.device.places import Places
from kilodelta.device.state import State
from kilodelta.export.artefacts import file_fact
from kilodelta.format.checkpoint import TensorInfo
from kilodelta.format.identity import Identity


def seal(
    places: Places,
    bundle: Bundle,
    *,
    known: Golden,
    infos: Mapping[str, TensorInfo],
    identity: Identity,
) -> Bundle:
    """Finish a folder whose `base/` holds what the mode needs; returns the bundle as written.

    Args:
        bundle: without its files, which are found in `base/`.
        known: golden inputs and outputs of the base.
        infos: what the base's tensors are.
        identity: their digests.
    """
    places.deltas.mkdir()
    golden.write(places.base / golden.FILE, known)
    bundles.write_tensors(places, infos, identity)
    facts = tuple(file_fact(path) for path in sorted(places.base.iterdir()))
    whole = replace(bundle, files=facts, tool=f"kilodelta {kilodelta.__version__}")
    bundles.write(places, whole)
    state.write(places, State())
    journal.append(places.journal, "bundled", 0, state=State().to_json())
    return whole
