"""Choose the TensorRT that builds an engine for given GPUs in given precisions.

`tensorrt_rtx` builds ahead of time for a list of GPU generations, on any machine; `tensorrt` builds
for the one GPU that is present. Source:
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from kilodelta.errors import ExportError, InputError, require
from kilodelta.export.manifest.facts import FLAVOURS
from kilodelta.export.tensorrt import cuda

CLASSIC, RTX = FLAVOURS
AUTO = "auto"
EXTRAS: Mapping[str, str] = MappingProxyType({CLASSIC: "tensorrt", RTX: "rtx"})

_CAPABILITY = re.compile(r"sm[1-9][0-9]{1,2}\Z")
_TURING, _AMPERE = 75, 80


def choose(flavour: str, capabilities: Sequence[str], dtypes: Sequence[str]) -> Any:
    """Return the TensorRT module that builds for these GPUs in these precisions.

    Args:
        flavour: `tensorrt`, `tensorrt_rtx`, or `auto`: RTX where it is installed and knows every
            GPU asked for, else `tensorrt`.
        capabilities: such as `("sm86", "sm89")`.
        dtypes: `float32`, `float16`, `bfloat16`.

    Raises:
        InputError: a text that is no compute capability, or no flavour.
        MissingPackageError: the flavour is not installed.
        ExportError: it does not build for such a GPU, or not in such a precision.
    """
    _check_spelling(flavour, capabilities)
    trt = _module(_pick(capabilities) if flavour == AUTO else flavour)
    possible = buildable(trt)
    unknown = [capability for capability in capabilities if capability not in possible]
    if unknown:
        raise _refused(trt, unknown, possible)
    _check_precision(trt, capabilities, dtypes)
    return trt


def buildable(trt: Any) -> tuple[str, ...]:
    """Return the compute capabilities that a TensorRT builds for on this machine."""
    if trt.__name__ == RTX:
        names = trt.ComputeCapability.__members__
        return tuple(name.lower() for name in names if _CAPABILITY.match(name.lower()))
    here = cuda.present()
    return () if here is None else (here,)


def _check_spelling(flavour: str, capabilities: Sequence[str]) -> None:
    if flavour not in (AUTO, *FLAVOURS):
        raise InputError(
            f"{flavour} is no flavour of TensorRT", fix=f"give {', '.join((AUTO, *FLAVOURS))}"
        )
    wrong = [name for name in capabilities if not _CAPABILITY.match(name)]
    if wrong or not capabilities or len(set(capabilities)) < len(capabilities):
        raise InputError(
            f"{','.join(capabilities)!r} is no list of compute capabilities",
            fix="give such as sm86,sm89, each once; `kilodelta doctor` tells this machine's",
        )


def _pick(capabilities: Sequence[str]) -> str:
    """RTX, unless it is missing, or lacks one of these GPUs while the other is installed."""
    if not _installed(CLASSIC):
        return RTX
    if not _installed(RTX) or set(capabilities) - set(buildable(_module(RTX))):
        return CLASSIC
    return RTX


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _module(name: str) -> Any:
    return require(name, extra=EXTRAS[name], why="build TensorRT engines")


def _refused(trt: Any, unknown: Sequence[str], possible: Sequence[str]) -> ExportError:
    asked = ", ".join(unknown)
    if trt.__name__ == RTX:
        return ExportError(
            f"tensorrt_rtx {trt.__version__} builds for {', '.join(possible)}, not for {asked}",
            fix=f"leave {asked} out, or build on a machine with that GPU and tensorrt",
        )
    here = f"this one is {possible[0]}" if possible else "no NVIDIA GPU or driver was found here"
    return ExportError(
        f"tensorrt builds for the GPU present, not for {asked}: {here}",
        fix=f"export on a machine with {asked}; or, for RTX GPUs, pip install '.[rtx]' in a clone",
    )


def _check_precision(trt: Any, capabilities: Sequence[str], dtypes: Sequence[str]) -> None:
    """Turing's RTX engines take float16 only; bfloat16 needs Ampere everywhere."""
    for capability in capabilities:
        number = int(capability[2:])
        refused = {"bfloat16"} if number < _AMPERE else set()
        if trt.__name__ == RTX and number == _TURING:
            refused.add("float32")
        wrong = sorted(refused & set(dtypes))
        if wrong:
            raise ExportError(
                f"{trt.__name__} for {capability} takes no {' and no '.join(wrong)}",
                fix=f"export {capability} with --dtype fp16, or leave it out",
            )
