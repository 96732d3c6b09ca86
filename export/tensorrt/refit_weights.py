"""Hand weights to a TensorRT refitter, by name, until it misses none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from kilodelta.errors import ExportError
from kilodelta.export.tensorrt.refit_values import RefitValues
from kilodelta.files.dtypes import BY_TENSORRT
from kilodelta.files.tensor import Bytes


class DeviceStream(Protocol):
    """A CUDA stream and its memory, such as `kilodelta.export.tensorrt.cuda.CudaStream`."""

    @property
    def address(self) -> int:
        """The stream as the integer that other libraries take."""

    def upload(self, array: Bytes) -> int:
        """Copy an array to the device; return its address there."""


def hand_over(
    trt: Any, refitter: Any, values: RefitValues, names: Iterable[str], stream: DeviceStream | None
) -> list[Bytes]:
    """Set all of `names`, then those that the refitter misses beside them.

    Args:
        trt: the TensorRT module.
        refitter: of the engine.
        values: the weights.
        names: those to set first.
        stream: where to upload the weights; None leaves them in host memory.

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
    trt: Any, refitter: Any, name: str, values: RefitValues, stream: DeviceStream | None
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
