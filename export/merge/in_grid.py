"""Write the tensors of a merge into the grid of a quantised base, each proved on its way.

Codes are read some rows at a time where their layout allows (`RowLayout`), else whole, given new
codes, packed, and decoded again from the packed bytes; that decoding gives the digest. Rows that
are nothing but nibbles stay packed meanwhile (`exact.in_bytes`). Every other tensor goes the way of
any merge (`streaming`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np

from kilodelta.errors import BaseMismatchError, ProofError, QualityError
from kilodelta.exact import sha256
from kilodelta.export.merge.pairs import Hashing
from kilodelta.export.merge.plan import FilePlan, Piece
from kilodelta.export.merge.streaming import MergeStream
from kilodelta.files import identity
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.copying import pwrite
from kilodelta.files.identity import Identity
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.grid.identity import matrix_digest, matrix_parts
from kilodelta.grid.layouts.base import Codes, Layout, Parts, RowLayout, Stream
from kilodelta.grid.matrix import Matrix
from kilodelta.grid.model import QuantisedModel
from kilodelta.merging.devices import Merge
from kilodelta.merging.in_grid import BAND, BYTES_BAND, Regridder, fits_bytes, regridded
from kilodelta.merging.quantised import MIN_CHANGED
from kilodelta.progress import Meter

AT_ONCE = 1 << 26
"""Weights of layouts without rows that are merged at a time, some six bytes each."""
MEASURED = 64
"""The update's size is measured in every so many rows: it is for the reader of an error only."""
BESIDE = (
    "apply the file beside the base (its update is exact there), compress anew with a larger"
    " update, or accept this with --min-changed 0"
)
"""What to do where the grid takes almost nothing of an update."""


@dataclass
class Tally:
    """What the merges in the grid changed, summed over targets by several threads."""

    changed: int = 0
    weights: int = 0
    steps: float = 0.0
    still: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, changed: int, weights: int, steps: float, still: int) -> None:
        """Count one target.

        Args:
            changed: codes that changed.
            weights: of how many.
            steps: the update's size in steps of the grid.
            still: weights whose step is zero.
        """
        with self._lock:
            self.changed += changed
            self.weights += weights
            self.steps += steps
            self.still += still

    @property
    def share(self) -> float:
        """The share of codes that changed."""
        return self.changed / self.weights if self.weights else 1.0

    def require(self, least: float, fix: str = BESIDE) -> None:
        """Refuse a merge that changed almost nothing.

        Args:
            least: the share of codes that must change.
            fix: what to do then.

        Raises:
            QualityError: fewer did; says the size of the update against the grid's step.
        """
        if self.weights and self.share < least:
            almost = self.share < MIN_CHANGED
            raise QualityError(
                f"the merge in the grid changes {self.changed} of {self.weights} codes"
                f" ({100 * self.share:.2g} %): the update is {self.steps / self.weights:.2g} of a"
                " step of the grid on average, and what is below half a step rounds away. "
                + ("The result would be the base" if almost else f"{100 * least:.2g} % are wanted"),
                fix=fix,
            )


def merge_weight(
    delta: Delta, model: QuantisedModel, name: str, parts: Parts, tally: Tally
) -> tuple[RawTensor, str]:
    """Merge one quantised weight.

    Args:
        delta: bound to the base.
        model: the quantised base.
        name: of a target that is quantised.
        parts: its stored tensors, proved by the caller.
        tally: counts what changes.

    Returns:
        the new stored tensor of the codes, and the logical digest of what it decodes to.

    Raises:
        CheckpointError: the weight cannot be read.
        ProofError: what was packed does not decode to the new codes.
    """
    layout = model.of(name).layout
    base = layout.unpack(parts).checked(name)
    new = regridded(delta, delta.target(name), base)
    tally.add(changed=new.changed, weights=base.codes.size, steps=new.steps, still=new.still)
    packed, written = recoded(name, layout, parts, new.matrix.codes)
    return packed, matrix_digest(name, written)


def recoded(name: str, layout: Layout, parts: Parts, codes: Codes) -> tuple[RawTensor, Matrix]:
    """Pack new codes as a layout stores them, and decode them again.

    Args:
        name: the weight's, for the error.
        layout: of the weight.
        parts: its stored tensors.
        codes: (out, in), as `Matrix.codes`.

    Returns:
        the new stored tensor of the codes, and the weight that it decodes to.

    Raises:
        ProofError: what was packed does not decode to the codes.
    """
    packed = layout.recode(parts, codes)
    written = layout.unpack({**parts, layout.codes_in: packed})
    require_same(name, layout, written.codes, codes)
    return packed, written


def _are_equal(written: Codes, new: Codes) -> bool:
    """Return whether codes of one byte are equal, eight at a time where their number allows."""
    if written.flags.c_contiguous and new.flags.c_contiguous and not new.size % 8:
        written, new = written.reshape(-1).view(np.uint64), new.reshape(-1).view(np.uint64)
    return np.array_equal(written, new)


@dataclass(frozen=True, kw_only=True)
class GridStream(MergeStream):
    """A merge stream that knows which stored tensors hold codes of targets."""

    model: QuantisedModel
    weights: dict[str, str]
    """The targets by the name of the stored tensor that holds their codes."""
    tally: Tally = field(default_factory=Tally)

    def target_of(self, stored: str) -> str:
        """Return the target whose codes, or merged bytes, a stored tensor holds."""
        return self.weights.get(stored, stored)

    def _may_share(self, piece: Piece) -> bool:
        if piece.name not in self.weights:
            return super()._may_share(piece)
        return isinstance(self.model.of(self.weights[piece.name]).layout, RowLayout)

    def _write_piece(self, descriptor: int, piece: Piece, meter: Meter) -> Hashing[str]:
        if piece.name not in self.weights:
            return (yield from super()._write_piece(descriptor, piece, meter))
        name = self.weights[piece.name]
        layout = self.model.of(name).layout
        if isinstance(layout, RowLayout):
            return (yield from self._write_rows(descriptor, piece, layout, name, meter))
        parts = proved_parts(self.model, self.identity, name)
        packed, digest = merge_weight(self.delta, self.model, name, parts, self.tally)
        pwrite(descriptor, packed.data.data, piece.begin)
        meter.add(piece.nbytes)
        return digest

    def _write_rows(
        self, descriptor: int, piece: Piece, layout: RowLayout, name: str, meter: Meter
    ) -> Hashing[str]:
        """Merge a weight some rows at a time; return the logical digest of what was written."""
        info, source = self.checkpoint.info(piece.name), self.checkpoint.tensor(piece.name)
        codes = RawTensor(dtype=info.dtype, shape=info.shape, data=np.empty(0, np.uint8))
        parts = {**self._read_parts(name, layout.codes_in), layout.codes_in: codes}
        grid = layout.grid(parts).checked_grid(name)
        packed_rows = fits_bytes(grid, layout.nibble_offset)
        regridder = Regridder(
            self.delta, self.delta.target(name), grid, every=MEASURED, packed=packed_rows
        )
        recode: _InBytes | _ByCodes = (
            _InBytes(regridder) if packed_rows else _ByCodes(regridder, layout, name, grid)
        )
        # Where all that is read shows in the logical digest, the result's root proves it as well.
        base = None
        if not (packed_rows and _shows_all(grid)):
            base = identity.tensor_hash(piece.name, info.dtype, info.shape, sha256.new)
        state, nbytes = sha256.new(), piece.nbytes // grid.shape[0]
        for part in matrix_parts(name, grid):
            yield state, part
        changed, steps = 0, 0.0
        for rows, left in regridder.bands(recode.BAND):
            begin, stop = rows.start * nbytes, rows.stop * nbytes
            stream = source[begin:stop].reshape(len(rows), nbytes)
            if base is not None:
                yield base, stream.data
            packed, written, count, sum_ = recode(rows, left, stream)
            yield state, np.ascontiguousarray(grid.kind.plus_zero(written)).data
            pwrite(descriptor, packed.reshape(-1).data, piece.begin + begin)
            meter.add(packed.size)
            changed, steps = changed + count, steps + sum_ * 2.0**grid.kind.unit
        if base is not None:
            self._require_known(piece.name, "sha256:" + base.hexdigest())
        weights, still = grid.shape[0] * grid.shape[1], grid.still_weights
        self.tally.add(changed=changed, weights=weights, steps=steps, still=still)
        return "sha256:" + state.hexdigest()

    def _read_parts(self, name: str, without: str) -> Parts:
        """Read a weight's scales and the like, whose values are in its logical digest."""
        places = {role: at for role, at in self.model.of(name).parts.items() if role != without}
        return {role: self.model.source.raw(place) for role, place in places.items()}

    def _require_unchanged(self, names: Iterable[str]) -> None:
        stored = (
            self.model.stored[self.weights[n]].parts.values() for n in names if n in self.weights
        )
        super()._require_unchanged(
            [*(n for n in names if n not in self.weights), *(p for parts in stored for p in parts)]
        )


class _InBytes:
    """Merge rows in bytes of two codes."""

    BAND = BYTES_BAND

    def __init__(self, regridder: Regridder) -> None:
        self._regridder = regridder
        self._packed, self._codes = np.empty(0, np.uint8), np.empty(0, np.uint8)

    def __call__(self, rows: range, left: Any, stream: Stream) -> tuple[Stream, Codes, int, float]:
        """Return new bytes, what they decode to, the codes that changed, and the update's size.

        Both arrays are overwritten by the next call.
        """
        if self._packed.size < stream.size:  # memory that is new each time would be cleared first
            self._packed = np.empty(stream.size, np.uint8)
            self._codes = np.empty(2 * stream.size, np.uint8)
        packed = self._packed[: stream.size].reshape(stream.shape)
        codes = self._codes[: 2 * stream.size].reshape(len(rows), -1)
        count, size = self._regridder.round_bytes(rows, left, stream, packed, codes)
        return packed, codes, count, size


class _ByCodes:
    """Merge rows of any layout: decode, round, encode, and decode once more."""

    BAND = BAND

    def __init__(self, regridder: Regridder, layout: RowLayout, name: str, grid: Matrix) -> None:
        self._regridder, self._layout, self._name, self._grid = regridder, layout, name, grid

    def __call__(self, rows: range, left: Any, stream: Stream) -> tuple[Stream, Codes, int, float]:
        old = self._grid.checked_codes(self._name, self._layout.decode(stream))
        new = np.empty_like(old, order="C")
        count, size = self._regridder.round(rows, left, np.ascontiguousarray(old), new)
        packed = self._layout.encode(stream, new)
        written = self._layout.decode(packed)
        require_same(self._name, self._layout, written, new)
        return packed, written, count, size


def _shows_all(grid: Matrix) -> bool:
    """Return whether no two rows of nibbles have one logical digest once they are merged.

    A merge makes every zero of a float kind +0, but for a block with a step of zero, whose codes
    stay: there the digest would not tell -0 from +0.
    """
    return not (grid.kind.is_float and grid.still)


def proved_parts(model: QuantisedModel, stored: Identity, name: str) -> Parts:
    """Read the stored tensors of a weight, and see that they are still the base's.

    Args:
        model: the base.
        stored: the identity over its stored tensors.
        name: the weight.

    Raises:
        BaseMismatchError: one has another digest than when the base was proved.
        CheckpointError: one cannot be read.
    """
    places = model.of(name).parts
    parts = {role: model.source.raw(place) for role, place in places.items()}
    for role, place in places.items():
        require_base_tensor(stored, place, identity.raw_digest(place, parts[role]))
    return parts


def require_base_tensor(stored: Identity, place: str, digest: str) -> None:
    """Check that a stored tensor is what it was when the base was proved.

    Raises:
        BaseMismatchError: it has another digest.
    """
    if digest != stored.tensors[place]:
        raise BaseMismatchError(
            f"{place} is not what it was when the base was proved",
            fix="let nothing write to the base, and start again",
        )


def require_same(name: str, layout: Layout, written: Codes, new: Codes) -> None:
    """Check that codes which were packed decode to themselves.

    Args:
        name: the weight's, for the error.
        layout: of the weight.
        written: what was packed decodes to.
        new: what was packed.

    Raises:
        ProofError: they do not.
    """
    if not _are_equal(written, new):
        raise ProofError(
            f"{name}: the codes that were packed do not decode to themselves",
            fix="this is a fault of kilodelta: please report it with the layout's name"
            f" ({layout.name})",
        )


def grid_stream(
    checkpoint: Checkpoint, stored: Identity, delta: Delta, model: QuantisedModel, merge: Merge
) -> GridStream:
    """Prepare the stream of a merge in the grid.

    Args:
        checkpoint: the base's files.
        stored: the identity over its stored tensors, just proved.
        delta: bound to `model`.
        model: the same base.
        merge: merges targets that are not quantised.
    """
    weights = {model.of(name).codes: name for name in delta.grid_targets}
    return GridStream(
        checkpoint=checkpoint,
        identity=stored,
        delta=delta,
        merge=merge,
        model=model,
        weights=weights,
    )


def threads_for(stream: GridStream, threads: int | None) -> int:
    """Return how many weights to merge at a time, so that they take a bounded amount of memory."""
    weights = [stream.model.of(name) for name in stream.delta.grid_targets]
    return at_once([prod(w.shape) for w in weights if not isinstance(w.layout, RowLayout)], threads)


def at_once(sizes: Sequence[int], threads: int | None) -> int:
    """Return how many of these weights, read whole, to merge at a time.

    Args:
        sizes: numbers of weights of each.
        threads: the most; all cores by default.
    """
    return max(1, min(threads or os.cpu_count() or 1, AT_ONCE // max(sizes, default=1)))


def with_codes(plans: list[FilePlan], stream: GridStream) -> list[FilePlan]:
    """Mark the pieces that hold codes of targets as merged."""
    return [
        replace(
            plan,
            pieces=tuple(
                replace(piece, kind="merge") if piece.name in stream.weights else piece
                for piece in plan.pieces
            ),
        )
        for plan in plans
    ]
