"""A model's tensors where they lie: one safetensors file, or a Hugging Face folder of shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.errors import CheckpointError
from kilodelta.files import canonical, plain
from kilodelta.files.safetensors import Entry, HeaderLayout, read_layout
from kilodelta.files.source import SourceFile, TensorBytes
from kilodelta.files.tensor import Bytes, RawTensor, TensorInfo
from kilodelta.kinds import kind_of_folder, looks_like_hub_id

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def in_name_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names by their UTF-8 bytes."""
    return tuple(sorted(names, key=lambda name: name.encode("utf-8")))


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One open file of a model."""

    file: SourceFile
    layout: HeaderLayout

    @classmethod
    def open(cls, path: Path, *, follow: bool) -> Shard:
        file = SourceFile(path, follow=follow)
        return cls(file=file, layout=read_layout(file))

    @property
    def path(self) -> Path:
        return self.file.path

    def tensor(self, entry: Entry) -> TensorBytes:
        """Name the bytes of one of its tensors; nothing is read yet."""
        return TensorBytes(self.file, entry.begin, entry.nbytes)

    @property
    def head(self) -> bytes:
        """What stands before the data: the header's length and the header."""
        return len(self.layout.header).to_bytes(8, "little") + self.layout.header


class Checkpoint:
    """The tensors of a model on disk, its files open; no tensor is read before it is used.

    Example:
        >>> base = Checkpoint.open("tests/golden/0.1.0/base.safetensors")
        >>> base.info(base.names[0])
        TensorInfo(name='conv.weight', dtype='F32', shape=(5, 2, 2, 1))
    """

    def __init__(self, path: Path, shards: tuple[Shard, ...], *, index: bytes | None) -> None:
        self.path = path
        self.shards = shards
        self.index = index
        """The text of the sharded model's index."""

        self._places = {entry.name: (s, entry) for s in shards for entry in s.layout.entries}
        self.names = in_name_order(self._places)
        """All tensor names, by UTF-8 bytes."""

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
        """Open a model; one that is open already is returned as it is.

        Args:
            path: a `.safetensors` file, a folder with one, a sharded Hugging Face folder, or a
                Hugging Face cache folder (`models--org--name`). In a folder no link is followed,
                but those of a cache to its own blobs.

        Raises:
            CheckpointError: nothing usable is there, or a file is damaged.
        """
        if isinstance(path, Checkpoint):
            return path
        place = Path(path)
        try:
            is_folder = place.is_dir()
        except (OSError, ValueError):  # a name that is too long, or holds a NUL
            is_folder = False
        if not is_folder and looks_like_hub_id(str(place)):
            raise CheckpointError(
                f"{place} is neither a file nor a folder here",
                fix=f"of a model on the hub give the folder that this prints: hf download {place}; "
                f"commands that open models also take hf:{place}",
            )
        if not is_folder:
            return cls(place, (Shard.open(place, follow=True),), index=None)
        return _open_folder(hub_snapshot(place))

    @property
    def folder(self) -> Path:
        """The folder of its files, where configuration and tokenizer lie."""
        return self.shards[0].path.parent

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the same tensors, those in `names` (old to new) under their new name."""
        other = Checkpoint(self.path, self.shards, index=self.index)
        other._places = {names.get(name, name): place for name, place in self._places.items()}
        other.names = in_name_order(other._places)
        return other

    def with_copies(self, names: Mapping[str, str]) -> Checkpoint:
        """Return the same tensors, and under each new name of `names` (new to old) the old one's.

        Files of tied models leave out all names but one; a comparison needs them.
        """
        copied = Checkpoint(self.path, self.shards, index=self.index)
        copied._places = {**self._places, **{new: self._places[old] for new, old in names.items()}}
        copied.names = in_name_order(copied._places)
        return copied

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def entry(self, name: str) -> tuple[Shard, Entry]:
        """Find the file that holds a tensor, and its place there.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self._places[name]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no tensor {name!r:.200}",
                fix="list its tensors: kilodelta digest --tensors",
            ) from None

    def info(self, name: str) -> TensorInfo:
        """Say what a tensor is.

        Raises:
            CheckpointError: there is no such tensor.
        """
        _, entry = self.entry(name)
        return TensorInfo(name=name, dtype=entry.dtype, shape=entry.shape)

    def tensor(self, name: str) -> TensorBytes:
        """Return a tensor's raw little-endian bytes, which are read where they are sliced.

        Raises:
            CheckpointError: there is no such tensor.
        """
        shard, entry = self.entry(name)
        return shard.tensor(entry)

    def data(self, name: str) -> Bytes:
        """Read a tensor's raw little-endian bytes into new memory, uint8 `(n,)`.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be read.
        """
        shard, entry = self.entry(name)
        return shard.file.read(entry.begin, entry.nbytes)

    def raw(self, name: str) -> RawTensor:
        """Read a tensor.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be read.
        """
        info = self.info(name)
        return RawTensor(dtype=info.dtype, shape=info.shape, data=self.data(name))


def hub_snapshot(folder: Path) -> Path:
    """Find a Hugging Face cache folder's snapshot: the one that `refs/main` names, or the only one.

    Any other folder is returned as it is.
    """
    snapshots = folder / "snapshots"
    if not plain.is_folder(snapshots):
        return folder
    if plain.is_file(folder / "refs" / "main"):
        return snapshots / _revision(folder / "refs" / "main")
    revisions = sorted(place for place in snapshots.iterdir() if plain.is_folder(place))
    if len(revisions) != 1:
        raise CheckpointError(
            f"{folder} holds {len(revisions)} snapshots and no refs/main",
            fix=f"name one of the folders below {snapshots}",
        )
    return revisions[0]


def _revision(reference: Path) -> str:
    """Read a revision, which is the name of a folder and never a path out of the cache."""
    with plain.explained(reference, CheckpointError):
        name = plain.read(reference, 1024).decode("utf-8", "replace").strip()
    if not _is_file_name(name) or not plain.is_folder(reference.parents[1] / "snapshots" / name):
        raise CheckpointError(
            f"{reference} names the revision {name!r:.80}, which the cache does not hold",
            fix="fetch the model again, or name one of the folders below snapshots",
        )
    return name


def _open_folder(folder: Path) -> Checkpoint:
    if os.path.lexists(folder / INDEX):
        return _open_sharded(folder)
    try:
        names = sorted(os.listdir(folder))
    except OSError as problem:
        raise CheckpointError(
            f"{folder} cannot be read: {problem.strerror}", fix="check the path and its permissions"
        ) from None
    files = [name for name in names if name.endswith(".safetensors")]
    if SINGLE in files:
        files = [SINGLE]
    if len(files) == 1:
        return Checkpoint(folder, (Shard.open(folder / files[0], follow=False),), index=None)
    if files:
        raise CheckpointError(
            f"{folder} holds {len(files)} .safetensors files and no {INDEX}",
            fix="name the file that is the model",
        )
    kind = kind_of_folder(folder)
    if kind is not None:
        raise CheckpointError(f"{folder} is {kind.what}", fix=kind.fix)
    raise CheckpointError(
        f"{folder} holds no .safetensors file",
        fix="give the folder that model.save_pretrained(FOLDER) writes, with model.safetensors",
    )


def _open_sharded(folder: Path) -> Checkpoint:
    with plain.explained(folder / INDEX, CheckpointError):
        text = plain.read_model_file(folder / INDEX, plain.INDEX_LIMIT)
    weight_map = _weight_map(folder / INDEX, text)
    files = sorted(set(weight_map.values()))
    shards = tuple(Shard.open(folder / name, follow=False) for name in files)
    held = {entry.name: s.path.name for s in shards for entry in s.layout.entries}
    count = sum(len(s.layout.entries) for s in shards)
    if held != weight_map or count != len(held):
        wrong = [n for n, _ in sorted(set(held.items()) ^ set(weight_map.items()))] or ["a tensor"]
        raise CheckpointError(
            f"{folder / INDEX} and its shards disagree about {wrong[0]!r:.200}",
            fix="the folder is incomplete or mixed from two models: fetch it again",
        )
    return Checkpoint(folder, shards, index=text)


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


def read_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Read the model folder's `config.json`; empty where there is none, or no JSON object.

    For what it only helps with: `kilodelta.models` refuses one that it cannot read.
    """
    if not checkpoint.path.is_dir():
        return {}
    try:
        config = canonical.loads_foreign(plain.read_model_file(checkpoint.folder / "config.json"))
    except (OSError, canonical.NotCanonicalError):
        return {}
    return config if isinstance(config, dict) else {}
