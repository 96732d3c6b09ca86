"""A TensorRT made of numpy, as far as refitting goes: it checks every call and keeps a record.

An engine's plan is an `.npz`: its weights, and lists of what is refittable, of what the builder
combined (setting one asks for the others), and of what it refuses.
"""

from __future__ import annotations

import ctypes
import io
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np


class DataType(Enum):
    FLOAT = 4
    HALF = 2
    BF16 = 102  # two bytes too; Enum members need values of their own
    INT64 = 8

    @property
    def width(self) -> int:
        return self.value % 100


class TensorLocation(Enum):
    HOST = 0
    DEVICE = 1


class SerializationFlag(Enum):
    EXCLUDE_WEIGHTS = 0
    INCLUDE_REFIT = 2


class Logger:
    """What `trt.ILogger` is to those who derive from it."""

    class Severity(Enum):
        ERROR = 1
        INTERNAL_ERROR = 0


@dataclass
class Weights:
    dtype: DataType
    pointer: int
    size: int


@dataclass
class Engine:
    """Weights by name: their type, and their bytes."""

    kinds: dict[str, DataType]
    data: dict[str, bytes]
    marked: list[str]
    combined: list[list[str]] = field(default_factory=list)
    refittable: bool = True

    def plan(self) -> bytes:
        file = io.BytesIO()
        arrays: dict[str, Any] = {
            f"w.{name}": np.frombuffer(raw, np.uint8) for name, raw in self.data.items()
        }
        kinds = np.array([[name, kind.name] for name, kind in self.kinds.items()])
        groups = np.array(["|".join(group) for group in self.combined], dtype=str)
        arrays |= {"kinds": kinds, "marked": np.array(self.marked, dtype=str), "combined": groups}
        np.savez(file, refittable=self.refittable, **arrays)
        return file.getvalue()

    def create_serialization_config(self) -> Config:
        return Config(flags={SerializationFlag.EXCLUDE_WEIGHTS})

    def serialize_with_config(self, config: Config) -> Any:
        assert SerializationFlag.EXCLUDE_WEIGHTS not in config.flags
        self.refittable = SerializationFlag.INCLUDE_REFIT in config.flags
        return np.frombuffer(self.plan(), np.uint8)


@dataclass
class Config:
    flags: set[SerializationFlag]

    def set_flag(self, flag: SerializationFlag) -> bool:
        self.flags.add(flag)
        return True

    def clear_flag(self, flag: SerializationFlag) -> bool:
        self.flags.discard(flag)
        return True


def parse(plan: bytes) -> Engine | None:
    if not plan.startswith(b"PK"):
        return None
    with np.load(io.BytesIO(plan)) as found:
        return Engine(
            kinds={name: DataType[kind] for name, kind in found["kinds"]},
            data={n[2:]: found[n].tobytes() for n in found.files if n.startswith("w.")},
            marked=[str(name) for name in found["marked"]],
            combined=[str(group).split("|") for group in found["combined"]],
            refittable=bool(found["refittable"]),
        )


class Device:
    """A stream whose memory is a dictionary; addresses are small, so reading them crashes."""

    address = 77

    def __init__(self) -> None:
        self.memory: dict[int, bytes] = {}

    def upload(self, array: Any) -> int:
        self.memory[1000 + len(self.memory)] = array.tobytes()
        return 999 + len(self.memory)


class TensorRT(ModuleType):
    """The module; set `refuses`, `stuck`, `outcome` to make it fail."""

    DataType, TensorLocation, SerializationFlag = DataType, TensorLocation, SerializationFlag
    Weights, ILogger = Weights, Logger

    def __init__(self, name: str = "tensorrt", version: str = "10.14.1") -> None:
        super().__init__(name)
        self.__version__ = version
        self.record: list[str] = []
        self.refuses: set[str] = set()
        self.stuck: list[str] = []
        self.outcome: bool | BaseException = True
        self.device = Device()

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        return Runtime(self)

    def Refitter(self, engine: Engine, logger: Any) -> Any:  # noqa: N802 - TensorRT's name
        return Refitter(self, engine, logger)


@dataclass
class Runtime:
    trt: TensorRT

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        self.trt.record.append("load")
        return parse(plan)


class Refitter:
    def __init__(self, trt: TensorRT, engine: Engine, logger: Any) -> None:
        self.trt, self.engine, self.logger = trt, engine, logger
        self.given: dict[str, tuple[Weights, TensorLocation]] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.marked)

    def get_weights_prototype(self, name: str) -> Weights:
        kind = self.engine.kinds.get(name)
        if kind is None:
            return Weights(DataType.FLOAT, 0, -1)
        return Weights(kind, 0, len(self.engine.data[name]) // kind.width)

    def set_named_weights(self, name: str, weights: Weights, place: TensorLocation) -> bool:
        self.trt.record.append(f"set {name} {place.name}")
        prototype = self.get_weights_prototype(name)
        if (weights.dtype, weights.size) != (prototype.dtype, prototype.size):
            return False
        self.given[name] = weights, place
        return name not in self.trt.refuses

    def get_missing_weights(self) -> list[str]:
        self.trt.record.append("missing?")
        groups = [group for group in self.engine.combined if self.given.keys() & set(group)]
        missing = {name for group in groups for name in group} - self.given.keys()
        return sorted(missing) + self.trt.stuck

    def refit_cuda_engine(self) -> bool:
        self.trt.record.append("refit")
        return self._refit()

    def refit_cuda_engine_async(self, stream: int) -> bool:
        self.trt.record.append(f"refit on {stream}")
        return self._refit()

    def _refit(self) -> bool:
        for index, (name, (weights, place)) in enumerate(self.given.items()):
            if self.trt.outcome is not True and index == 1:
                self.logger.log(Logger.Severity.ERROR, "half way through")
                if isinstance(self.trt.outcome, BaseException):
                    raise self.trt.outcome
                return False
            self.engine.data[name] = self._read(weights, place)
        return True

    def _read(self, weights: Weights, place: TensorLocation) -> bytes:
        if place is TensorLocation.DEVICE:
            return self.trt.device.memory[weights.pointer]
        return ctypes.string_at(weights.pointer, weights.size * weights.dtype.width)
