"""What every runner offers, and how inputs become what an artefact takes.

`available` opens the artefact exactly as `run` will use it and returns the error that `run` would
raise, so a runner that is available has not fallen back to something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kilodelta.errors import InputError, KiloDeltaError, ProofError
from kilodelta.files.dtypes import FLOATS, DType

Arrays: TypeAlias = dict[str, NDArray[Any]]
Batch: TypeAlias = Mapping[str, NDArray[Any]]

UNIT_ROUNDOFF: Mapping[str, float] = {row.long: row.unit_roundoff for row in FLOATS.values()}
"""By precision, the largest relative error of one rounding to nearest: half an ulp of 1."""


class Runner(Protocol):
    """One way to compute a model's outputs."""

    @property
    def name(self) -> str:
        """Engine and device, such as `onnxruntime-cpu`."""

    def available(self) -> KiloDeltaError | None:
        """Return None if `run` will work here, else what is missing: a package, GPU or kernel.

        Raises:
            ProofError: the artefact itself is broken.
        """

    def run(self, batch: Batch) -> Arrays:
        """Compute the outputs by name: floats of any precision, integers or booleans.

        Raises:
            InputError: the artefact takes inputs of another type.
            ProofError: the artefact does not take these inputs, or cannot run here.
            MissingPackageError: the package that runs it is not installed.
        """


class UnavailableError(ProofError):
    """This machine cannot run the artefact, which says nothing against the artefact."""


def feed(batch: Batch, name: str, dtype: DType) -> NDArray[Any]:
    """Return an input as contiguous elements of the dtype's storage, as a runtime takes them.

    Args:
        batch: the inputs by name.
        name: the input that the artefact asks for.
        dtype: the type that it asks for.

    Raises:
        ProofError: the batch lacks this input.
        InputError: a value would become another one, as `converted`.

    Example:
        >>> from kilodelta.files.dtypes import DTYPES
        >>> feed({"ids": np.array([[1, 2]])}, "ids", DTYPES["I32"])
        array([[1, 2]], dtype=int32)
    """
    if name not in batch:
        raise ProofError(
            f"the artefact wants an input {name!r}, the inputs hold {', '.join(batch)}",
            fix="give inputs with the names that the model was exported with",
        )
    if dtype.name == "BF16":  # numpy lacks it: its bits travel as uint16
        return FLOATS["BF16"].narrow(converted(name, batch[name], np.float32))
    return converted(name, batch[name], dtype.storage)


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
