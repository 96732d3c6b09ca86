"""A model's tensors where they lie: one safetensors file, or a Hugging Face folder of shards."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kilodelta.errors import CheckpointError
from kilodelta.files import canonical
from kilodelta.files.safetensors import Entry, Layout, map_file, read_layout
from kilodelta.files.tensor import RawTensor, TensorInfo

INDEX = "model.safetensors.index.json"
INDEX_LIMIT = 64 << 20


def in_name_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names sorted by their UTF-8 bytes."""
    return tuple(sorted(names, key=lambda name: name.encode("utf-8")))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One mapped file of a model."""

    path: Path
    layout: Layout
    data: mmap.mmap


class Checkpoint:
    """The tensors of a model on disk, mapped read-only; nothing is read before it is used.

    Example:
        >>> Checkpoint.open("model/").info("encoder.layer.0.attention.self.query.weight")
        ... # doctest: +SKIP
        TensorInfo(name='encoder...', dtype='F32', shape=(384, 384))
    """

    def __init__(self, path: Path, shards: tuple[Shard, ...], *, index: bytes | None) -> None:
        self.path = path
        self.shards = shards
        self.index = index
        self._places = {entry.name: (s, entry) for s in shards for entry in s.layout.entries}
        self.names = in_name_order(self._places)
        """All tensor names, by UTF-8 bytes."""

    @classmethod
    def open(cls, path: str | Path | Checkpoint) -> Checkpoint:
        """Open a `.safetensors` file, a folder with one, a sharded Hugging Face folder, or a
        Hugging Face cache folder (`models--org--name`).

        Raises:
            CheckpointError: nothing usable there, or a damaged file.
        """
        if isinstance(path, Checkpoint):
            return path
        place = Path(path)
        try:
            is_folder = place.is_dir()
        except OSError:
            is_folder = False
        if not is_folder:
            return cls(place, (_open_shard(place),), index=None)
        return _open_folder(_hub_snapshot(place))

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same tensors, those in `names` (old to new) under their new name."""
        found = Checkpoint(self.path, self.shards, index=self.index)
        found._places = {names.get(name, name): place for name, place in self._places.items()}
        found.names = in_name_order(found._places)
        return found

    def with_copies(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the same tensors, and under each new name of `names` (new to old) the old one's.

        Files of tied models leave out all names but one; a comparison needs them.
        """
        found = Checkpoint(self.path, self.shards, index=self.index)
        found._places = {**self._places, **{new: self._places[old] for new, old in names.items()}}
        found.names = in_name_order(found._places)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def entry(self, name: str) -> tuple[Shard, Entry]:
        """The file that holds a tensor, and its place there."""
        try:
            return self._places[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r}",
                fix="list its tensors: kilodelta digest --tensors",
            ) from None

    def info(self, name: str) -> TensorInfo:
        _, entry = self.entry(name)
        return TensorInfo(name=name, dtype=entry.dtype, shape=entry.shape)

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's raw little-endian bytes, a read-only view of the mapped file."""
        shard, entry = self.entry(name)
        return np.frombuffer(shard.data, np.uint8, entry.nbytes, entry.begin)

    def raw(self, name: str) -> RawTensor:
        """The tensor as `data` gives it, with its dtype and shape."""
        _, entry = self.entry(name)
        return RawTensor(dtype=entry.dtype, shape=entry.shape, data=self.data(name))


def _open_shard(path: Path) -> Shard:
    data = map_file(path)
    return Shard(path=path, layout=read_layout(data, path), data=data)


def _hub_snapshot(folder: Path) -> Path:
    """A Hugging Face cache folder's snapshot: the one `refs/main` names, or the only one."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    reference = folder / "refs" / "main"
    if reference.is_file():
        return snapshots / reference.read_text().strip()
    found = sorted(snapshots.iterdir())
    if len(found) != 1:
        raise CheckpointError(
            f"{folder} holds {len(found)} snapshots and no refs/main",
            fix=f"name one of the folders below {snapshots}",
        )
    return found[0]


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / INDEX).exists():
        return _open_sharded(folder)
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors") in files:
        files = [folder / "model.safetensors"]
    if len(files) == 1:
        return Checkpoint(folder, (_open_shard(files[0]),), index=None)
    if files:
        raise CheckpointError(
            f"{folder} holds {len(files)} .safetensors files and no {INDEX}",
            fix="name the file that is the model",
        )
    other = next((p.name for p in sorted(folder.iterdir()) if p.suffix in {".bin", ".pt"}), None)
    raise CheckpointError(
        f"{folder} holds no .safetensors file" + (f", only {other}" if other else ""),
        fix="save the model with save_pretrained(..., safe_serialization=True)",
    )


def _open_sharded(folder: Path) -> Checkpoint:
    text = _read_index(folder / INDEX)
    weight_map = _weight_map(folder / INDEX, text)
    shards = tuple(_open_shard(folder / name) for name in sorted(set(weight_map.values())))
    found = {entry.name: s.path.name for s in shards for entry in s.layout.entries}
    count = sum(len(s.layout.entries) for s in shards)
    if found != weight_map or count != len(found):
        wrong = [n for n, _ in sorted(set(found.items()) ^ set(weight_map.items()))] or ["a tensor"]
        raise CheckpointError(
            f"{folder / INDEX} and its shards disagree about {wrong[0]}",
            fix="the folder is incomplete or mixed from two models: fetch it again",
        )
    return Checkpoint(folder, shards, index=text)


def _read_index(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(INDEX_LIMIT)
    except OSError as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem.strerror}", fix="check the path and its permissions"
        ) from None


def _weight_map(path: Path, text: bytes) -> dict[str, str]:
    try:
        table: Any = canonical.loads(text)
    except canonical.NotCanonicalError as problem:
        raise CheckpointError(f"{path} is not JSON: {problem}", fix="fetch it again") from None
    weights = table.get("weight_map") if isinstance(table, dict) else None
    if not (isinstance(weights, dict) and weights and all(map(_is_file_name, weights.values()))):
        raise CheckpointError(
            f"{path} has no weight_map of tensor names to files beside it",
            fix="fetch the index again",
        )
    return weights


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in {"", ".", ".."} and not set(name) & set("/\\\0")
