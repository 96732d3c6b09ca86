"""The last step of making a device folder: write down what lies in `base/`, serve the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import kilodelta
from kilodelta.device.folder import bundle as bundles
from kilodelta.device.folder import journal, state
from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.places import Places
from kilodelta.device.folder.state import State
from kilodelta.device.golden import golden
from kilodelta.device.golden.golden import Golden
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.files.identity import Identity
from kilodelta.files.tensor import TensorInfo


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
