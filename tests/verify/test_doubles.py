"""The doubles of TensorRT and of the CUDA driver, held against the real modules.

A double that offers a method which the real class lacks, or takes other arguments, would let tests
pass that fail on a GPU. TensorRT's bindings state their signatures in docstrings; the driver's are
in `cuda.h`, which triton's wheel brings along.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kilodelta.files.dtypes import BY_TENSORRT
from tests.doubles import engines, refitter, tensorrt

FLAVOURS = ("tensorrt_rtx", "tensorrt")

CLASSES: dict[type, str] = {
    tensorrt.FakeEngine: "ICudaEngine",
    tensorrt.FakeContext: "IExecutionContext",
    engines.Engine: "ICudaEngine",
    engines.Context: "IExecutionContext",
    refitter.Engine: "ICudaEngine",
    refitter.Config: "ISerializationConfig",
    refitter.Runtime: "Runtime",
    refitter.Refitter: "Refitter",
}
"""Each double, and the class of TensorRT that it stands for."""

OF_THE_DOUBLE = {"plan", "session"}
"""Methods by which doubles work inside; nothing calls them on a real object."""

ENUMS: tuple[tuple[Any, str], ...] = (
    (refitter.DataType, "DataType"),
    (refitter.TensorLocation, "TensorLocation"),
    (refitter.SerializationFlag, "SerializationFlag"),
)


@pytest.fixture(params=FLAVOURS)
def real(request: pytest.FixtureRequest) -> ModuleType:
    """A TensorRT that is installed here; TensorRT's own classic bindings need its libraries."""
    module: ModuleType = pytest.importorskip(
        request.param, reason=f"{request.param} is not installed", exc_type=ImportError
    )
    return module


def methods(double: type) -> dict[str, Any]:
    """The public methods that a double defines itself."""
    return {
        name: method
        for name, method in vars(double).items()
        if inspect.isfunction(method) and name[0] != "_" and name not in OF_THE_DOUBLE
    }


def split(arguments: str) -> list[str]:
    """Arguments at the commas outside brackets."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def overloads(method: Any, name: str) -> Iterator[tuple[int, int]]:
    """The fewest and the most arguments of each overload of a binding, `self` left out."""
    for found in re.finditer(rf"(?m)^(?:\d+\. )?{name}\((self.*)\) ->", method.__doc__ or ""):
        arguments = split(found.group(1))[1:]
        yield sum("=" not in part for part in arguments), len(arguments)


def taken(method: Any) -> int:
    """Arguments that a double's method takes, `self` left out."""
    return len(inspect.signature(method).parameters) - 1


@pytest.mark.parametrize("double", CLASSES, ids=lambda d: f"{d.__module__[14:]}.{d.__name__}")
def test_tensorrts_classes_have_every_method_with_these_arguments(
    real: ModuleType, double: type
) -> None:
    counterpart = getattr(real, CLASSES[double])
    assert methods(double)
    for name, method in methods(double).items():
        assert hasattr(counterpart, name), f"{CLASSES[double]} has no {name}"
        ranges = list(overloads(getattr(counterpart, name), name))
        assert ranges, f"{name} states no signature"
        assert any(low <= taken(method) <= high for low, high in ranges), (name, ranges)


@pytest.mark.parametrize("name", ["num_io_tensors", "num_optimization_profiles", "refittable"])
def test_an_engine_has_these_properties(real: ModuleType, name: str) -> None:
    assert isinstance(getattr(real.ICudaEngine, name), property)


def test_enumerations_have_every_member(real: ModuleType) -> None:
    for double, name in ENUMS:
        assert set(double.__members__) <= set(getattr(real, name).__members__), name
    severities = set(vars(tensorrt.FakeTensorrt.ILogger.Severity)) | set(
        refitter.Logger.Severity.__members__
    )
    assert severities <= set(real.ILogger.Severity.__members__)
    assert {"INPUT", "OUTPUT"} <= set(real.TensorIOMode.__members__)
    assert set(BY_TENSORRT) <= set(real.DataType.__members__)


@pytest.mark.parametrize(
    ("name", "double"),
    [("Runtime", tensorrt.FakeTensorrt.Runtime), ("Refitter", refitter.TensorRT.Refitter),
     ("Weights", refitter.Weights.__init__)],
)  # fmt: skip
def test_objects_are_made_from_these_arguments(real: ModuleType, name: str, double: Any) -> None:
    ranges = list(overloads(getattr(real, name).__init__, "__init__"))
    assert any(low <= taken(double) <= high for low, high in ranges), ranges


def test_a_wrong_double_is_noticed(real: ModuleType) -> None:
    """The comparison can fail: too many arguments, and a name that is not there."""

    class Wrong:
        def get_tensor_name(self, index: int, more: int) -> str:
            return ""

        def get_tensor_color(self, name: str) -> str:
            return ""

    ranges = list(overloads(real.ICudaEngine.get_tensor_name, "get_tensor_name"))
    assert ranges == [(1, 1)]
    assert taken(Wrong.get_tensor_name) == 2
    assert not hasattr(real.ICudaEngine, "get_tensor_color")
    assert split("self: a.B, x: dict[str, int] = {}, y: typing.SupportsInt") == [
        "self: a.B", "x: dict[str, int] = {}", "y: typing.SupportsInt",
    ]  # fmt: skip


# the driver


@pytest.fixture(scope="module")
def header() -> str:
    triton = pytest.importorskip("triton", reason="triton, which brings cuda.h, is not installed")
    place = Path(triton.__file__).parent / "backends" / "nvidia" / "include" / "cuda.h"
    if not place.is_file():
        pytest.skip("this triton brings no cuda.h")
    return place.read_text(encoding="utf-8", errors="replace")


DRIVER = [name for name in dir(engines.Cuda) if re.match(r"cu[A-Z]", name)]


@pytest.mark.parametrize("name", DRIVER)
def test_the_drivers_functions_take_these_arguments(header: str, name: str) -> None:
    """`cuMemAlloc_v2` is declared as `cuMemAlloc`, which a macro renames."""
    renamed = re.search(rf"#\s*define\s+(\w+)\s+(?:\w+\()?{name}\b", header)
    plain = renamed.group(1) if renamed else name
    found = re.search(rf"CUresult\s+CUDAAPI\s+{plain}\s*\(([^;]*)\);", header)
    assert found is not None, f"cuda.h declares no {plain}"
    arguments = [part for part in split(found.group(1)) if part != "void"]
    assert taken(getattr(engines.Cuda, name)) == len(arguments), arguments


def test_the_drivers_numbers_are_those_of_the_header(header: str) -> None:
    from kilodelta.export.tensorrt import cuda
    from kilodelta.verify.runners import cuda_graph

    for text, number in (
        ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", cuda._CAPABILITY_MAJOR),
        ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR", cuda._CAPABILITY_MINOR),
        ("CU_STREAM_CAPTURE_MODE_THREAD_LOCAL", cuda_graph._THREAD_LOCAL),
        ("CUDA_ERROR_NO_DEVICE", 100),
        ("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", 901),
    ):
        assert re.search(rf"{text}\s*=\s*{number}\b", header), text
