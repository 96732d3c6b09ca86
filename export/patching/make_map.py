"""Make the map of an ONNX file that any tool exported from a base.

Content decides (`kilodelta.export.patching.match`); a name only ever chooses between tensors whose
bytes are equal. What was fused, folded or merged is noted with its reason, and refused when a delta
wants to change it; so is a tensor of which the file also holds a quantised copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from kilodelta.errors import InputError, OutputError
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.manifest.facts import FileFact
from kilodelta.export.onnx.file import OnnxFile, read_onnx
from kilodelta.export.onnx.tensors import PackedWeight, Stored
from kilodelta.export.patching.codes.find import ExactValues, find_codes
from kilodelta.export.patching.codes.streams import in_rest, parts_in_rest
from kilodelta.export.patching.derived import Values, find_derived
from kilodelta.export.patching.map import FilePlace, PatchMap
from kilodelta.export.patching.match import Match, match_all
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import TARGETS
from kilodelta.files.model_digest import digest
from kilodelta.files.safetensors import write as write_safetensors
from kilodelta.files.safetensors import write_stream
from kilodelta.files.tensor import Bytes, RawTensor, TensorInfo
from kilodelta.grid.model import QuantisedModel
from kilodelta.grid.open import is_quantised, open_quantised
from kilodelta.merging.outline import outline_of
from kilodelta.progress import Progress, silent

SHOWN = 3
"""Names listed at most in a reason."""

NOTHING: Mapping[str, RawTensor] = MappingProxyType({})


def make_map(
    model: str | Path,
    base: str | Path | Checkpoint | QuantisedModel,
    *,
    heads: Mapping[str, RawTensor] = NOTHING,
    unused: Iterable[str] = (),
    threads: int | None = None,
    progress: Progress = silent,
) -> PatchMap:
    """Find the base's tensors in an ONNX file.

    Args:
        model: the `.onnx` file, its external data beside it.
        base: the checkpoint it was exported from, or the quantised model.
        heads: tensors that the file holds and the base lacks, with their values in the file
            (`kilodelta.export.open_headed`); every fine-tune brings its own.
        unused: tensors that the outputs do not depend on, where that is known
            (`Template.unused`): a delta may change them without the file's following.
        threads: cores to use; all by default.
        progress: called with how far the work is, in bytes.

    Raises:
        CheckpointError: one of the two cannot be read.
        InputError: the file holds no tensor of the base.
    """
    if is_quantised(base):
        return _codes_map(Path(model), open_quantised(base), heads, unused, threads, progress)
    assert not isinstance(base, QuantisedModel)  # `is_quantised` says so
    file, checkpoint = read_onnx(Path(model)), Checkpoint.open(base)
    identity = digest(checkpoint, threads=threads, progress=progress)
    wanted = {name: checkpoint.raw(name) for name in checkpoint.names} | dict(heads)
    matches = match_all(file, wanted, threads, progress)
    places, refused = _settled(matches, file)
    if not places.keys() - heads.keys():
        raise InputError(
            f"{file.path} holds no tensor of {checkpoint.path}",
            fix="give the checkpoint that the ONNX file was exported from",
        )
    copies = _copies(checkpoint, places.keys() - heads.keys(), file, _matched(matches))
    return PatchMap(
        files=_files(file),
        root=identity.root,
        tensors={name: checkpoint.info(name) for name in checkpoint.names},
        digests=identity.tensors,
        places={name: own for name, own in places.items() if name not in copies},
        refused=refused | copies,
        heads={name: tensor.info(name) for name, tensor in heads.items()},
        unused=tuple(name for name in wanted if name in set(unused)),
    )


def _codes_map(
    model: Path,
    base: QuantisedModel,
    heads: Mapping[str, RawTensor],
    unused: Iterable[str],
    threads: int | None,
    progress: Progress,
) -> PatchMap:
    """Find a quantised base's codes in an ONNX file, and its other tensors as they are."""
    file = read_onnx(model)
    stored = base.stored_identity(threads=threads, progress=progress)
    outline = outline_of(base, base.identity(threads=threads, progress=progress))
    codes, without_codes = find_codes(file, base, outline)
    if not codes:
        name, why = next(iter(without_codes.items()))
        raise InputError(
            f"{file.path} holds no codes of {base.path}: of {name}, {why}",
            fix="give the quantised model that the ONNX file was exported from",
        )
    wanted = {name: base.source.raw(name) for name in base.plain} | dict(heads)
    matches = match_all(file, wanted, threads, progress)
    places, refused = _settled(matches, file)
    held = {(p.file, p.begin) for own in codes.values() for c in own for p in c.parts.values()}
    taken = held | _matched(matches)
    copies = _copies(_Plain(base), places.keys() - heads.keys(), file, taken)
    copies |= _copies(ExactValues(base), codes.keys(), file, taken)
    idle = [name for name in without_codes if name in set(unused)]
    return PatchMap(
        files=_files(file),
        root=stored.root,
        tensors={name: base.source.info(name) for name in stored.tensors},
        digests=stored.tensors,
        places={name: own for name, own in places.items() if name not in copies},
        refused=refused | without_codes | copies,
        heads={name: tensor.info(name) for name, tensor in heads.items()},
        unused=tuple(name for name in (*base.stored, *wanted) if name in set(unused)),
        outline=outline,
        codes={name: own for name, own in codes.items() if name not in copies}
        | {name: (in_rest(name, base.matrix(name)),) for name in idle},
    )


@dataclass(frozen=True)
class _Plain:
    """The tensors of a quantised base that are no part of a quantised weight."""

    base: QuantisedModel

    @property
    def names(self) -> tuple[str, ...]:
        return self.base.plain

    def info(self, name: str) -> TensorInfo:
        return self.base.source.info(name)

    def data(self, name: str) -> Bytes:
        return self.base.source.raw(name).data


def write_rest(
    patch_map: PatchMap, base: str | Path | Checkpoint | QuantisedModel, path: str | Path
) -> Path | None:
    """Write the weights that patching needs and the ONNX file does not hold exactly.

    Those are the matrices that the model's outputs do not depend on, and all of them where the file
    rounds the base's weights to float16 or bfloat16. Codes of a quantised base are in the file
    itself, but for those that no output depends on.

    Args:
        patch_map: the file's map.
        base: the checkpoint that it was made with.
        path: a new safetensors file.

    Returns:
        `path`; None where nothing is missing, and nothing was written.

    Raises:
        OutputError: `path` exists, or cannot be written.
    """
    if Path(path).exists():
        raise OutputError(f"{path} exists already", fix="give a new name, or remove this file")
    lacking = [
        info
        for info in patch_map.changeable
        if info.dtype in TARGETS and len(info.shape) > 1 and not patch_map.exact(info.name)
    ]
    if patch_map.outline is not None:
        return _write_codes_rest(patch_map, open_quantised(base), lacking, Path(path))
    assert not isinstance(base, QuantisedModel)  # whose map has an outline
    checkpoint = Checkpoint.open(base)
    if not lacking:
        return None
    write_stream(Path(path), lacking, (checkpoint.data(info.name).data for info in lacking))
    return Path(path)


def _write_codes_rest(
    patch_map: PatchMap, base: QuantisedModel, lacking: Sequence[TensorInfo], path: Path
) -> Path | None:
    tensors = {info.name: base.source.raw(info.name) for info in lacking}
    for name, own in patch_map.codes.items():
        for copy in own:
            if copy.needs_rest:
                tensors |= parts_in_rest(copy, base.matrix(name))
    if not tensors:
        return None
    write_safetensors(path, tensors)
    return path


def _files(file: OnnxFile) -> tuple[FileFact, ...]:
    held: list[Stored | PackedWeight] = [*file.tensors, *file.packed]
    names = dict.fromkeys((file.path.name, *(tensor.file for tensor in held)))
    return tuple(replace(file_fact(file.path.parent / name), file=name) for name in names)


def _matched(matches: Sequence[Match]) -> set[tuple[str, int]]:
    return {(place.file, place.begin) for match in matches for place in match.places}


def _copies(
    base: Values, names: Iterable[str], file: OnnxFile, taken: Set[tuple[str, int]]
) -> dict[str, str]:
    """Explain why tensors cannot be patched of which the file also holds a copy in another form.

    Args:
        base: the values.
        names: its tensors that the file holds.
        file: the file.
        taken: files and offsets of what is patched, or belongs to it.
    """
    held: list[Stored | PackedWeight] = [*file.tensors, *file.packed]
    foreign = [
        tensor
        for tensor in held
        if tensor.name in file.used and (tensor.file, tensor.begin) not in taken
    ]
    copies = find_derived(base, sorted(names), file.path.parent, foreign)
    return {
        name: f"the file also holds it quantised, scaled or folded ({_some(own)}), "
        "and that copy would stay the base's"
        for name, own in copies.items()
    }


def _settled(
    matches: Sequence[Match], file: OnnxFile
) -> tuple[dict[str, tuple[FilePlace, ...]], dict[str, str]]:
    """Return the places of what is identified, and the reasons for the rest."""
    equals = _equals(matches)
    named = {match.name for match in matches if any(p.name == match.name for p in match.places)}
    places: dict[str, tuple[FilePlace, ...]] = {}
    refused: dict[str, str] = {}
    for match in matches:
        twins = equals[match.name]
        by_name = match.constant or bool(twins)
        if not match.places:
            refused[match.name] = _absent(match, file)
        elif match.symmetric:
            refused[match.name] = "it equals its transpose, so its layout cannot be told"
        elif by_name and not {match.name, *twins} <= named:
            refused[match.name] = _doubtful(twins)
        else:
            places[match.name] = tuple(
                place for place in match.places if not by_name or place.name == match.name
            )
    return places, refused


def _equals(matches: Sequence[Match]) -> dict[str, list[str]]:
    """List for each base tensor the others that claim one of its places."""
    claims: dict[tuple[str, int], list[str]] = {}
    for match in matches:
        for place in match.places:
            claims.setdefault((place.file, place.begin), []).append(match.name)
    return {
        match.name: sorted(
            {name for p in match.places for name in claims[p.file, p.begin]} - {match.name}
        )
        for match in matches
    }


def _absent(match: Match, file: OnnxFile) -> str:
    names = {tensor.name for tensor in file.tensors}
    if match.name in {*names, *file.sealed} & file.used:
        if match.name in file.sealed:
            return "its values are not kept in one piece of bytes (save the model with raw data)"
        return "the tensor of that name holds other values: something was folded into it"
    if match.name in names:
        return "it is there, but feeds nothing: the graph uses a fused or folded copy"
    return "no tensor holds its values: it was fused, folded, quantised, or no output needs it"


def _doubtful(twins: list[str]) -> str:
    if not twins:
        return "all its values are equal and no tensor has its name, so it cannot be told"
    return f"its values equal those of {_some(twins)}, and the exporter may have merged them"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
