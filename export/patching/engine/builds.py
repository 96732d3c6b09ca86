"""Build engines of one base with other weights: its usual build, a twin's, a fine-tune's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from kilodelta.errors import ExportError
from kilodelta.export.patching.engine.places import (
    OTHERWISE,
    difference,
    is_stated,
    located,
    written,
)
from kilodelta.export.patching.engine.twin import Value, perturbed, twin_of
from kilodelta.export.patching.map import FilePlace
from kilodelta.export.patching.plan import WAY_OUT
from kilodelta.progress import Event, Progress, silent

Build = Callable[[Mapping[str, Value], Path], object]
"""Builds the base's engine with some of its weights replaced, into a new file."""

Places = dict[str, tuple[FilePlace, ...]]

TRIES = 8
"""Builds of the same weights. Measured with TensorRT-RTX 1.7: five or six in ten are the usual one,
whose internal values have their usual numbers."""

AGREEING = 3
"""Equal builds of the base that are waited for."""

PROOFS = 16
"""Builds of a fine-tune until one is the patched engine: at one in four, one map in a hundred is
refused by chance; it can be made again."""

NONE_APART: Mapping[str, Value] = MappingProxyType({})


class EngineBuilds:
    """Builds engines into a scratch folder, as often as it takes.

    Args:
        build: builds one.
        work: a folder for them; each is removed when it was read.
        progress: called after each build.
        way_out: what to do where the engine cannot be patched.
        apart: weights of the base that are made different in every build (`apart.py`).
    """

    def __init__(
        self,
        build: Build,
        work: Path,
        progress: Progress = silent,
        *,
        way_out: str = WAY_OUT,
        apart: Mapping[str, Value] = NONE_APART,
    ) -> None:
        self._build, self._work, self._progress, self._count = build, work, progress, 0
        self._way_out, self._apart = way_out, apart

    def build(self, changed: Mapping[str, Value]) -> bytes:
        """Build an engine with some weights replaced, and return its bytes."""
        path = self._work / "trial.engine"
        self._build({**self._apart, **changed}, path)
        self._count += 1
        self._progress(Event(stage="map: engines", done=self._count, total=0, unit="builds"))
        data = path.read_bytes()
        path.unlink()
        return data

    def reproducible(self) -> bytes:
        """Return the base's engine that builds give most often: the first one to come three times.

        The first to come twice may be a rare one, which builds of a fine-tune then do not hit: of
        14 builds of a small ALBERT in float32, TensorRT-RTX 1.7.1 gave 7, 4, 2 and 1 of four
        engines, which differ in the order of the two outputs and in the numbers of internal values.

        Raises:
            ExportError: all builds differ.
        """
        seen: Counter[bytes] = Counter()
        for _ in range(TRIES):
            data = self.build({})
            seen[data] += 1
            if seen[data] == AGREEING:
                return data
        [(data, count)] = seen.most_common(1)
        if count > 1:
            return data
        raise ExportError(
            f"{TRIES} builds of the base gave {TRIES} different engines, so none can be patched",
            fix=self._way_out,
        )

    def stated(self, twin: Mapping[str, Value]) -> set[str]:
        """Return the tensors whose first values the engine's texts state."""
        data = self.build(twin)
        return {name for name, tensor in twin.items() if is_stated(data, tensor)}

    def located(
        self, held: bytes, own: Mapping[str, Value], dtype: str, file: str
    ) -> tuple[Places, dict[str, str]]:
        """Return the places of all tensors, and why some have none.

        A twin of another layout than the base's engine is built again, for the layout may be one
        of TensorRT's unusual ones; at last only matrices are replaced in it.

        Args:
            held: the base's engine.
            own: the base's values, which `held` must have in the same places.
            dtype: the network's precision.
            file: the engine's name.
        """
        matrices = {name: tensor for name, tensor in own.items() if len(tensor.shape) > 1}
        best: tuple[Places, dict[str, str]] = ({}, {})
        for asked in (own, matrices):
            twin = twin_of(asked)
            for _ in range(TRIES):
                found = located(held, self.build(twin), twin, own, dtype, file)
                if OTHERWISE not in found[1].values():
                    return found[0], dict.fromkeys(own.keys() - asked, OTHERWISE) | found[1]
                best = max(best, found, key=lambda pair: len(pair[0]))
        return best

    def proved(
        self,
        held: bytes,
        places: Mapping[str, tuple[FilePlace, ...]],
        own: Mapping[str, Value],
    ) -> set[str]:
        """Build one further fine-tune, and return the tensors that patching gets right in it.

        Those are all, or the matrices alone, where a vector is also part of something that was
        computed from it.

        Raises:
            ExportError: patching does not give what a build of the matrices gives.
        """
        matrices = {name for name in places if len(own[name].shape) > 1}
        for kept in (set(places), matrices):
            other = {n: perturbed(own[n], seed) for seed, n in enumerate(places) if n in kept}
            try:
                self.require_build(other, written(held, places, other), "a further fine-tune")
            except ExportError:
                if kept == matrices or not matrices:
                    raise
                continue
            return kept
        raise AssertionError("the last attempt returns or raises")

    def require_build(self, changed: Mapping[str, Value], wanted: bytes, what: str) -> None:
        """See that a build with these tensors replaced is, in every byte, what is wanted.

        Args:
            changed: the tensors.
            wanted: a patched engine.
            what: what is built, for the message.

        Raises:
            ExportError: none of several builds is.
        """
        last = ""
        for _ in range(PROOFS):
            data = self.build(changed)
            if data == wanted:
                return
            last = difference(data, wanted)
        raise ExportError(
            f"the map is refuted: of {PROOFS} builds of {what} none is the patched engine; {last}",
            fix=self._way_out,
        )
