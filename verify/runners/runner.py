"""What every runner can do: say why it cannot run here, and compute named outputs from inputs.

A runner never falls back to something else in silence: `available` opens the artefact in the very
way `run` will use it, and returns the error that `run` would raise where that does not come off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import InputError, KiloDeltaError, ProofError

Arrays: TypeAlias = dict[str, NDArray[Any]]
Batch: TypeAlias = Mapping[str, NDArray[Any]]

# Unit roundoff: half the distance from 1 to the next number, 2^-(bits of the significand).
UNIT_ROUNDOFF = {
    "float64": 2.0**-53,
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}


class Runner(Protocol):
    """One way to compute a model's outputs, named `engine-device` such as `onnxruntime-cpu`."""

    @property
    def name(self) -> str: ...

    def available(self) -> KiloDeltaError | None:
        """None when `run` will work here, else why not: a package, a GPU or a kernel is missing.

        Raises:
            ProofError: the artefact itself is broken.
        """

    def run(self, batch: Batch) -> Arrays:
        """The outputs by name, in floats of any precision.

        Raises:
            ProofError: the artefact does not take these inputs, or cannot run here.
            MissingPackageError: the package that runs it is not installed.
        """


class UnavailableError(ProofError):
    """This machine cannot run the artefact, which says nothing against the artefact."""


def take(batch: Batch, name: str) -> NDArray[Any]:
    """The input that an artefact asks for by name.

    Raises:
        ProofError: the batch does not hold it.
    """
    if name in batch:
        return batch[name]
    raise ProofError(
        f"the artefact wants an input {name!r}, the inputs hold {', '.join(batch)}",
        fix="give inputs with the names that the model was exported with",
    )


def converted(name: str, values: Any, dtype: Any) -> NDArray[Any]:
    """Return an input in the dtype that an artefact takes, if that keeps its values.

    Floats are rounded to the artefact's precision. Everything else has to come out as it was:
    numpy would cut 1.7 to the token id 1, and wrap 300 around to the pixel 44.

    Args:
        name: the input's, for messages.
        values: an array of numbers, of any dtype.
        dtype: numpy's, of the artefact's input.

    Raises:
        InputError: a value would become another one.

    Example:
        >>> converted("ids", np.array([1.0, 2.0]), np.int64)
        array([1, 2])
    """
    given, wanted = np.asarray(values), np.dtype(dtype)
    if given.dtype.kind not in "biuf":
        raise InputError(
            f"input {name} holds {given.dtype}, not numbers", fix=f"give an array of {wanted}"
        )
    with np.errstate(all="ignore"):  # what is lost is found below
        result: NDArray[Any] = np.asarray(given, dtype=wanted, order="C")
        kept = result == given
        if wanted.kind == "f":  # may round, but not to infinity
            kept = np.isfinite(result) | ~np.isfinite(given)
    if not np.all(kept):
        lost = given[~kept].flat[0]
        raise InputError(
            f"input {name} holds {lost!s} as {given.dtype}; the model takes {wanted}, which cannot "
            "hold it",
            fix=f"give an array of {wanted}, such as the tokenizer's ids as they are",
        )
    return result


def one_line(error: BaseException) -> str:
    """An exception as one line of a report: its first non-empty line, or its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
