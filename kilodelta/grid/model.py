"""A quantised model: which of its stored tensors make which weight, and the root of it all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kilodelta import parallel
from kilodelta.errors import CheckpointError
from kilodelta.files.checkpoint import Checkpoint, in_name_order
from kilodelta.files.dtypes import FLOATS
from kilodelta.files.identity import Identity, of_digests, raw_digest, root, tensor_hash
from kilodelta.files.model_digest import digest
from kilodelta.files.tensor import GRID, RawTensor, TensorInfo
from kilodelta.grid.identity import config_digest, kind_text, matrix_digest, matrix_hash
from kilodelta.grid.layouts.base import Layout, Parts
from kilodelta.grid.matrix import Matrix, Shape
from kilodelta.progress import Meter, Progress, silent


class Source(Protocol):
    """Where stored tensors lie: a `Checkpoint`, a GGUF file, an ONNX graph."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def info(self, name: str) -> TensorInfo: ...

    def raw(self, name: str) -> RawTensor: ...


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One quantised weight: its layout, and its stored tensors' names by role."""

    name: str
    layout: Layout
    parts: Mapping[str, str]

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return self.layout.shape

    @property
    def codes(self) -> str:
        """The name of the stored tensor that holds the codes."""
        return self.parts[self.layout.codes_in]


@dataclass(frozen=True, kw_only=True)
class Renamed:
    """Where a tensor that is not quantised lies, if a model is read by other names than its file's.

    Attributes:
        place: its name in the file.
        rows: of which of its rows each row of the file is, int64; None where the order is the same.
    """

    place: str
    rows: npt.NDArray[np.int64] | None = None

    def read(self, stored: RawTensor) -> RawTensor:
        """Bring the rows of the stored tensor into this one's order."""
        return stored if self.rows is None else self._moved(stored, np.argsort(self.rows))

    def write(self, tensor: RawTensor) -> RawTensor:
        """Undo `read`."""
        return tensor if self.rows is None else self._moved(tensor, self.rows)

    def _moved(self, tensor: RawTensor, order: npt.NDArray[np.int64]) -> RawTensor:
        rows = tensor.data.reshape(len(order), -1)
        return replace(tensor, data=rows[order].reshape(-1))


@dataclass(frozen=True, kw_only=True)
class LogicalIdentity:
    """What a quantised model is, in any layout.

    Attributes:
        root: over the quantised weights' logical digests, in name order.
        weights: those digests by name.
        plain: root over all other tensors by value: F16, BF16 and F32 spellings of the same
            numbers are one.
        grids: root over everything but their codes: steps, zero points, blocks.
        kinds: what they are, such as `int4 1x32` (kind of code, block), sorted, each once.
        config: digest of the quantisation configuration as it stands in the files.
        still_blocks: blocks with a step of zero, whose weights no code can change.
    """

    root: str
    weights: Mapping[str, str]
    plain: str
    grids: str
    kinds: tuple[str, ...]
    config: str
    still_blocks: int


@dataclass(frozen=True, kw_only=True)
class QuantisedModel:
    """A model whose weights are stored as codes and scales.

    Attributes:
        path: where it lies.
        method: what quantised it: `compressed-tensors`, `gptq`, `gguf`, ...
        config: the quantisation configuration as the files have it.
        stored: the quantised weights, by name, in name order.
        plain: the names of all tensors that are no part of one.
        source: the stored tensors.
        renamed: where tensors of `plain` lie that the source has by other names.
    """

    path: Path
    method: str
    config: Mapping[str, Any]
    stored: Mapping[str, Stored]
    plain: tuple[str, ...]
    source: Source
    renamed: Mapping[str, Renamed] = field(default_factory=dict)

    def place_of(self, name: str) -> Renamed:
        """Say where a tensor that is not quantised lies."""
        return self.renamed.get(name, Renamed(place=name))

    def plain_raw(self, name: str) -> RawTensor:
        """Read a tensor that is not quantised.

        Raises:
            CheckpointError: it cannot be read.
        """
        where = self.place_of(name)
        return where.read(self.source.raw(where.place))

    def plain_info(self, name: str) -> TensorInfo:
        """Return type and shape of a tensor that is not quantised."""
        return replace(self.source.info(self.place_of(name).place), name=name)

    def parts(self, name: str) -> Parts:
        """Read the stored tensors of a weight, by role."""
        return {role: self.source.raw(place) for role, place in self.of(name).parts.items()}

    def of(self, name: str) -> Stored:
        """Say where a weight lies.

        Raises:
            CheckpointError: no quantised weight has that name.
        """
        if name not in self.stored:
            raise CheckpointError(
                f"{self.path} has no quantised weight {name!r:.200}",
                fix="list them: kilodelta digest --tensors",
            )
        return self.stored[name]

    def matrix(self, name: str) -> Matrix:
        """Read a weight.

        Raises:
            CheckpointError: a stored tensor is missing or does not fit, a scale is NaN or
                infinite, or a code is out of range.
        """
        stored = self.of(name)
        try:
            return stored.layout.unpack(self.parts(name)).checked(name)
        except CheckpointError as problem:
            if problem.what.startswith(name):
                raise
            raise CheckpointError(f"{name}: {problem.what}", fix=problem.fix) from None

    def identity(
        self, *, threads: int | None = None, progress: Progress = silent
    ) -> LogicalIdentity:
        """Compute the logical identity; each matrix is in memory for as long as it is hashed.

        Raises:
            CheckpointError: as `matrix`.
        """
        names = list(self.stored)
        weights = [self.stored[name].shape for name in names]
        meter = Meter("decode", sum(a * b for a, b in weights), "weights", progress)

        def one(name: str) -> tuple[str, str, str, int]:
            matrix = self.matrix(name)
            meter.add(matrix.codes.size)
            bare = matrix_hash(name, matrix)
            whole = matrix_digest(name, matrix, bare.copy())
            return whole, "sha256:" + bare.hexdigest(), kind_text(matrix), matrix.still

        done = parallel.run(
            one, names, meter, threads=threads, weight=lambda name: self.stored[name].shape[0]
        )
        digests, grids, kinds, still = zip(*done, strict=True)
        return LogicalIdentity(
            root=root(digests),
            weights=dict(zip(names, digests, strict=True)),
            plain=root(self._plain_digests()),
            grids=root(grids),
            kinds=tuple(sorted(set(kinds))),
            config=config_digest(self.config),
            still_blocks=sum(still),
        )

    def infos(self) -> Iterator[TensorInfo]:
        """List what a delta may change: quantised weights as (out, in) of `GRID`, then the rest."""
        for name, stored in self.stored.items():
            yield TensorInfo(name=name, dtype=GRID, shape=stored.shape)
        for name in self.plain:
            yield self.plain_info(name)

    def stored_identity(
        self, *, cached: bool = False, threads: int | None = None, progress: Progress = silent
    ) -> Identity:
        """Compute the identity over the stored tensors, as of any model (docs/format.md, 4).

        Args:
            cached: take the digests remembered of unchanged files: a hint, no proof.
            threads: cores to hash on; all by default.
            progress: is told how many bytes are hashed.

        Raises:
            CheckpointError: a file cannot be read.
        """
        if isinstance(self.source, Checkpoint):
            return digest(self.source, cached=cached, threads=threads, progress=progress)
        return of_digests(
            {name: raw_digest(name, self.source.raw(name)) for name in self.source.names}
        )

    def _plain_digests(self) -> Iterator[str]:
        for name in self.plain:
            yield value_digest(name, self.plain_raw(name))


def value_digest(name: str, tensor: RawTensor) -> str:
    """Compute a tensor's digest by value: floats as F32 (which holds F16 and BF16 exactly)."""
    narrow = tensor.dtype in ("F16", "BF16", "F32")
    dtype = "F32" if narrow else tensor.dtype
    state = tensor_hash(name, dtype, tensor.shape)
    values = FLOATS[tensor.dtype].widen(tensor.data) + np.float32(0) if narrow else tensor.data
    state.update(np.ascontiguousarray(values).data)
    return "sha256:" + state.hexdigest()


def described(
    path: Path, method: str, config: Mapping[str, Any], stored: list[Stored], source: Source
) -> QuantisedModel:
    """Make the model of the weights that a reader recognised among a source's tensors.

    Args:
        path: of the model.
        method: how it was quantised, for people.
        config: its configuration.
        stored: the quantised weights.
        source: all tensors.

    Raises:
        CheckpointError: there are none, or two of one name.
    """
    if not stored:
        raise CheckpointError(
            f"{path} is taken for a quantised model ({method}), but no weight is stored quantised",
            fix="give the model that was quantised, all shards; of a float model the checkpoint"
            " itself",
        )
    for weight in stored:
        if min(weight.shape) < 1:
            raise CheckpointError(
                f"{path}: {weight.name} has shape {list(weight.shape)}, which holds no weight",
                fix="the file is damaged, or written by a tool that failed: fetch it again",
            )
    by_name = {weight.name: weight for weight in stored}
    if len(by_name) != len(stored):
        raise CheckpointError(
            f"{path}: two quantised weights have one name", fix="fetch the model again"
        )
    used = {place for weight in stored for place in weight.parts.values()}
    return QuantisedModel(
        path=path,
        method=method,
        config=config,
        stored={name: by_name[name] for name in in_name_order(by_name)},
        plain=in_name_order(set(source.names) - used),
        source=source,
    )
