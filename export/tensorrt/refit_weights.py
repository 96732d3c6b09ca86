"""The weights that a refit gives to an engine: computed and proved, then handed over by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from kilodelta import parallel
from kilodelta.errors import ExportError
from kilodelta.export.merge.tensor import (
    changed_names,
    merged_tensor,
    require_result,
    rounded,
)
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import BY_TENSORRT, nbytes
from kilodelta.files.floats import castable
from kilodelta.files.identity import raw_digest
from kilodelta.files.tensor import Bytes, RawTensor
from kilodelta.format.delta import Delta
from kilodelta.progress import Meter, Progress


class TunedWeights:
    """A fine-tune's weights by name: merged, stored whole, or the base's; proved when made.

    Args:
        delta: bound to its base.
        base: a checkpoint with at least the delta's targets.
        threads: cores to use; all by default.
        progress: called with the bytes that are done.

    Raises:
        CheckpointError: `base` lacks a target.
        ProofError: the merged targets are not the ones that the delta promises.
    """

    def __init__(
        self, delta: Delta, base: Checkpoint, *, threads: int | None, progress: Progress
    ) -> None:
        names = changed_names(delta)
        sizes = {n: base.info(n).nbytes for n in delta.tensors}
        sizes |= {n: extra.data.size for n, extra in delta.extras.items()}
        meter = Meter("expand", sum(sizes.values()), "B", progress)

        def work(name: str) -> RawTensor:
            tensor = merged_tensor(delta, name, base.data)
            meter.add(sizes[name])
            return tensor

        made = parallel.run(work, names, meter, weight=lambda n: sizes[n], threads=threads)
        self._base, self._tuned = base, dict(zip(names, made, strict=True))
        require_result(delta, {n: raw_digest(n, self._tuned[n]) for n in delta.tensors})

    def get(self, name: str, dtype: str, count: int) -> Bytes:
        """Return a weight's raw bytes, uint8 `(n,)`, as an engine holds it.

        Args:
            name: the weight's.
            dtype: the safetensors dtype of the engine's weight.
            count: its number of elements.

        Raises:
            ExportError: the weight does not fit the engine.
            CheckpointError: neither the delta nor the base has a tensor of that name.
        """
        tensor = self._tuned.get(name) or self._base.raw(name)
        if not castable(tensor.dtype, dtype) or nbytes("U8", tensor.shape) != count:
            raise ExportError(
                f"{name} is {tensor.dtype} {tensor.shape}, the engine's has {count} of {dtype}",
                fix="give the engine of this base, or a delta without that extra tensor",
            )
        return rounded(name, tensor, dtype)


class DeviceStream(Protocol):
    """A CUDA stream and its memory, such as `kilodelta.export.tensorrt.cuda.CudaStream`."""

    @property
    def address(self) -> int:
        """The stream as the integer that other libraries take."""

    def upload(self, array: Bytes) -> int:
        """Copy an array to the device and return its address there."""


def hand_over(
    trt: Any,
    refitter: Any,
    values: TunedWeights,
    names: Iterable[str],
    stream: DeviceStream | None,
) -> list[Bytes]:
    """Set all of `names`, then whatever else the refitter asks for, until it misses nothing.

    A weight may be combined with others in the engine; the refitter then misses those as well.

    Args:
        trt: the TensorRT module.
        refitter: its `Refitter` of the engine.
        values: the fine-tune's weights.
        names: the engine's refittable weights.
        stream: put the weights into device memory of this stream; by default they stay on the
            host.

    Returns:
        Host memory that TensorRT reads until the refit is over.

    Raises:
        ExportError: a weight is refused, or stays missing after it was set.
    """
    kept: list[Bytes] = []
    waiting, done = list(names), set[str]()
    while waiting:
        for name in waiting:
            kept += _set(trt, refitter, name, values, stream)
        done |= set(waiting)
        waiting = list(refitter.get_missing_weights())
        if stuck := (done | {""}) & set(waiting):
            raise ExportError(
                f"TensorRT goes on missing {', '.join(n or 'one without name' for n in stuck)}",
                fix="build the engine again with these weights refittable",
            )
    return kept


def _set(
    trt: Any, refitter: Any, name: str, values: TunedWeights, stream: DeviceStream | None
) -> list[Bytes]:
    prototype = refitter.get_weights_prototype(name)
    kind = prototype.dtype.name
    dtype = BY_TENSORRT[kind].name if kind in BY_TENSORRT else kind
    data = values.get(name, dtype, prototype.size)
    address = data.ctypes.data if stream is None else stream.upload(data)
    place = trt.TensorLocation.HOST if stream is None else trt.TensorLocation.DEVICE
    weights = trt.Weights(prototype.dtype, address, prototype.size)
    if not refitter.set_named_weights(name, weights, place):
        raise ExportError(
            f"TensorRT refuses new values for {name}",
            fix="build the engine again with this weight refittable",
        )
    return [data] if stream is None else []
