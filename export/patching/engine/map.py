"""Make the map of an engine: by building it again with values that tell where they went.

An engine's format is not published. So the map is not read from it but measured. The base is built
until two builds are equal, for TensorRT numbers its internal values anew in some builds. Then a
twin is built, whose weights are random values that no other weight has, and each weight is looked
for in its bytes (`locate.py`). At last one further fine-tune, of other values, is built, and must
be, byte for byte, what the map makes of the base's engine. A weight that was folded, quantised or
reordered has no place, and a fine-tune that changes it is refused by name. Of a quantised base the
twin's codes are random, and scales stay the base's. Weights of equal values are made different
meanwhile (`apart.py`).
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
from kilodelta.export.patching.engine.apart import equals, told_apart, value_of
from kilodelta.export.patching.engine.builds import Build, EngineBuilds, Places
from kilodelta.export.patching.engine.codes import code_places
from kilodelta.export.patching.engine.places import (
    written,
)
from kilodelta.export.patching.engine.twin import Value, twin_of, unsearchable
from kilodelta.export.patching.map import PatchMap
from kilodelta.export.patching.plan import WAY_OUT, WAY_OUT_OF_CODES
from kilodelta.files import staging
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import DTYPES
from kilodelta.files.model_digest import digest
from kilodelta.files.tensor import RawTensor
from kilodelta.grid.model import QuantisedModel
from kilodelta.merging.outline import outline_of
from kilodelta.progress import Progress, silent

STATED = "texts in the engine state its values, and would go on stating the base's"
ELSEWHERE = "the engine also holds something that was computed from it"
EQUAL = "its values equal those of {}, and TensorRT keeps equal ones once"

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
    tensors = {name: heads.get(name) or value_of(base, name) for name in weights}
    way_out = WAY_OUT_OF_CODES if isinstance(base, QuantisedModel) else WAY_OUT
    with staging.scratch(engine) as work:

        def builder(apart: Mapping[str, Value]) -> EngineBuilds:
            return EngineBuilds(build, work, progress, way_out=way_out, apart=apart)

        held, places, refused = _mapped(builder, tensors, dtype, engine.name)
        engine.write_bytes(held)
    if not places:
        [(why, _)] = Counter(refused.values()).most_common(1)
        raise ExportError(
            f"none of {len(tensors)} weights stands in the engine as it is: {why}", fix=way_out
        )
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


def _mapped(
    builder: Callable[[Mapping[str, Value]], EngineBuilds],
    tensors: Mapping[str, Value],
    dtype: str,
    file: str,
) -> tuple[bytes, Places, dict[str, str]]:
    """Return the base's engine, the proved places of its weights, and why some have none.

    Matrices that equal another are told apart (`apart.py`), so that each has a place. Where one of
    them has none, it stays as it is and is refused with those that it equals, and so are vectors.

    Args:
        builder: returns what builds the base with some weights made different.
        tensors: the network's weights.
        dtype: its precision.
        file: the engine's name.
    """
    unsearched = {name: why for name, tensor in tensors.items() if (why := unsearchable(tensor))}
    searchable = {name: t for name, t in tensors.items() if name not in unsearched}
    groups = equals(searchable, dtype)
    once = [group for group in groups if any(len(tensors[n].shape) < 2 for n in group)]
    while True:
        apart = told_apart(tensors, [group for group in groups if group not in once])
        refused = unsearched | {n: EQUAL.format(group[0]) for group in once for n in group[1:]}
        refused |= {group[0]: EQUAL.format(group[1]) for group in once}
        searched = {n: apart.get(n, t) for n, t in tensors.items() if n not in refused}
        builds = builder(apart)
        held = builds.reproducible()
        stated = builds.stated(twin_of(searched))
        refused |= dict.fromkeys(stated, STATED)
        searched = {name: t for name, t in searched.items() if name not in stated}
        places, why_not = builds.located(held, searched, dtype, file)
        refused |= why_not
        lacking = [group for group in groups if group not in once and set(group) - places.keys()]
        if not lacking:
            break
        once += lacking
    if places:
        kept = builds.proved(held, places, searched)
        refused |= dict.fromkeys(places.keys() - kept, ELSEWHERE)
        places = {name: own for name, own in places.items() if name in kept}
    return written(held, places, {name: tensors[name] for name in apart}), places, refused


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
