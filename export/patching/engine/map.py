"""Make the map of an engine: by building it again with values that tell where they went.

An engine's format is not published. So the map is not read from it but measured. The base is built
until two builds are equal, for TensorRT numbers its internal values anew in some builds. Then a
twin is built, whose weights are random values that no other weight has, and each weight is looked
for in its bytes (`locate.py`). At last one further fine-tune, of other values, is built, and must
be, byte for byte, what the map makes of the base's engine. A weight that was folded, quantised or
reordered has no place, and a fine-tune that changes it is refused by name. Of a quantised base the
twin's codes are random, and scales stay the base's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from kilodelta.errors import ExportError
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.patching.codes.streams import in_rest
from kilodelta.export.patching.engine.codes import code_places
from kilodelta.export.patching.engine.places import (
    OTHERWISE,
    difference,
    is_stated,
    located,
    written,
)
from kilodelta.export.patching.engine.twin import Value, perturbed, twin_of, unsearchable
from kilodelta.export.patching.map import FilePlace, PatchMap
from kilodelta.export.patching.plan import WAY_OUT, WAY_OUT_OF_CODES
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import DTYPES
from kilodelta.files.model_digest import digest
from kilodelta.files.tensor import RawTensor
from kilodelta.grid.model import QuantisedModel
from kilodelta.merging.outline import outline_of
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

STATED = "texts in the engine state its values, and would go on stating the base's"
ELSEWHERE = "the engine also holds something that was computed from it"

NOTHING: Mapping[str, RawTensor] = MappingProxyType({})


def make_engine_map(
    engine: Path,
    base: Checkpoint | QuantisedModel,
    build: Build,
    *,
    dtype: str,
    weights: Iterable[str],
    heads: Mapping[str, RawTensor] = NOTHING,
    unused: Iterable[str] = (),
    progress: Progress = silent,
) -> PatchMap:
    """Build the base's engine and the map of it, and prove the map by two further models.

    Args:
        engine: the new engine's path.
        base: the checkpoint, or the quantised model.
        build: builds the engine of the base with some weights replaced.
        dtype: the network's precision: "F32", "F16" or "BF16".
        weights: the tensors that the network holds.
        heads: tensors that the network has and the base lacks, with their values.
        unused: tensors that the outputs do not depend on.
        progress: called after each step.

    Raises:
        ExportError: no two builds are equal, no weight has a place, or the further fine-tune is
            not what the map says.
        OutputError: a file cannot be written.
    """
    source = base.source if isinstance(base, QuantisedModel) else base
    tensors = {name: heads.get(name) or _own(base, name) for name in weights}
    way_out = WAY_OUT_OF_CODES if isinstance(base, QuantisedModel) else WAY_OUT
    with staging.scratch(engine) as work:
        builder = EngineBuilds(build, work, progress, way_out=way_out)
        held = builder.reproducible()
        engine.write_bytes(held)
        refused = {name: why for name, tensor in tensors.items() if (why := unsearchable(tensor))}
        searched = {name: t for name, t in tensors.items() if name not in refused}
        stated = builder.stated(twin_of(searched))
        refused |= dict.fromkeys(stated, STATED)
        searched = {name: t for name, t in searched.items() if name not in stated}
        places, why_not = builder.located(held, searched, dtype, engine.name)
        refused |= why_not
        if not places:
            [(why, _)] = Counter(refused.values()).most_common(1)
            raise ExportError(
                f"none of {len(tensors)} weights stands in the engine as it is: {why}", fix=way_out
            )
        kept = builder.proved(held, places, searched)
        refused |= dict.fromkeys(places.keys() - kept, ELSEWHERE)
        places = {name: own for name, own in places.items() if name in kept}
    identity = base.stored_identity() if isinstance(base, QuantisedModel) else digest(base)
    floats = PatchMap(
        files=(file_fact(engine),),
        root=identity.root,
        tensors={name: source.info(name) for name in identity.tensors},
        digests=identity.tensors,
        places={name: own for name, own in places.items() if isinstance(tensors[name], RawTensor)},
        refused=refused,
        heads={name: tensor.info(name) for name, tensor in heads.items()},
        unused=tuple(unused),
    )
    if isinstance(base, QuantisedModel):
        return _with_codes(floats, base, held, places, dtype)
    return floats


def _own(base: Checkpoint | QuantisedModel, name: str) -> Value:
    if isinstance(base, QuantisedModel):
        return base.matrix(name) if name in base.stored else base.source.raw(name)
    return base.raw(name)


def _with_codes(
    floats: PatchMap, base: QuantisedModel, held: bytes, places: Places, dtype: str
) -> PatchMap:
    """Add the places of a quantised base's codes to the map of its other tensors."""
    codes = {}
    for name in base.stored:
        if name in places and name not in floats.heads:
            matrix = base.matrix(name)
            long = DTYPES[dtype].long
            codes[name] = tuple(code_places(held, matrix, one, long) for one in places[name])
        elif name in floats.unused:
            codes[name] = (in_rest(name, base.matrix(name)),)
    outline = outline_of(base, base.identity())
    return replace(floats, outline=outline, codes=codes)


class EngineBuilds:
    """Builds engines into a scratch folder, as often as it takes.

    Args:
        build: builds one.
        work: a folder for them; each is removed when it was read.
        progress: called after each build.
        way_out: what to do where the engine cannot be patched.
    """

    def __init__(
        self, build: Build, work: Path, progress: Progress = silent, *, way_out: str = WAY_OUT
    ) -> None:
        self._build, self._work, self._progress, self._count = build, work, progress, 0
        self._way_out = way_out

    def build(self, changed: Mapping[str, Value]) -> bytes:
        """Build an engine with some weights replaced, and return its bytes."""
        path = self._work / "trial.engine"
        self._build(changed, path)
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
