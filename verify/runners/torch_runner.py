"""Running a torch module: the float64 reference, and plain torch in the other precisions."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from kilodelta.errors import KiloDeltaError, ProofError
from kilodelta.verify.runners.runner import Arrays, Batch, UnavailableError, one_line


class TorchRunner:
    """A copy of `module` in `precision` on `device` ("cpu" or "cuda").

    Floating inputs are cast to the precision, integers and booleans are left alone. `outputs`
    names what a module returns as a tensor or a tuple; a mapping brings its own names.
    """

    def __init__(
        self, module: torch.nn.Module, outputs: Sequence[str], *, precision: str, device: str
    ) -> None:
        self.name = f"torch-{device}"
        self.precision = precision
        self._source, self._outputs, self._device = module, tuple(outputs), device
        self._module: torch.nn.Module | None = None

    def available(self) -> KiloDeltaError | None:
        """None, or that torch sees no GPU."""
        if self._device == "cpu" or torch.cuda.is_available():
            return None
        return UnavailableError(
            "torch sees no CUDA device",
            fix="use a machine with an NVIDIA GPU and a CUDA build of torch",
        )

    def run(self, batch: Batch) -> Arrays:
        """The outputs as float64 arrays (float32 values and narrower widen exactly)."""
        error = self.available()
        if error is not None:
            raise error
        result = self._forward({name: self._tensor(array) for name, array in batch.items()})
        return {
            name: tensor.detach().double().cpu().numpy()
            for name, tensor in named_outputs(result, self._outputs).items()
        }

    def _forward(self, inputs: dict[str, torch.Tensor]) -> object:
        try:
            with as_precision(self.precision, self._device):
                return self.module(**inputs)
        except RuntimeError as error:
            if "not implemented for" not in str(error):
                raise
            raise UnavailableError(
                f"torch on {self._device} cannot compute in {self.precision}: {one_line(error)}",
                fix="verify on a GPU with --device cuda",
            ) from error

    @property
    def module(self) -> torch.nn.Module:
        """The converted copy, made when first used."""
        if self._module is None:
            converted = copy.deepcopy(self._source).to(self._device, self._dtype)
            self._module = converted.eval()
        return self._module

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(array)).to(self._device)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def named_outputs(result: object, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """A module's return value by output name.

    Raises:
        ProofError: the module does not return all of `names`.
    """
    if isinstance(result, Mapping):
        found = {name: result[name] for name in names if name in result}
    else:
        values = (result,) if isinstance(result, torch.Tensor) else tuple(result)  # type: ignore[arg-type]
        found = dict(zip(names, values, strict=False))
    missing = [name for name in names if not isinstance(found.get(name), torch.Tensor)]
    if missing:
        raise ProofError(
            f"the model does not return {', '.join(missing)}",
            fix="give the model whose outputs the artefact was exported with",
        )
    return found


@contextmanager
def as_precision(precision: str, device: str) -> Iterator[None]:
    """Compute without gradients, in nothing narrower than `precision` unless the model asks."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if device == "cuda":  # cuDNN's convolutions use TF32 unless told otherwise
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        if precision == "float64":
            stack.enter_context(Widen())
        yield


class Widen(TorchFunctionMode):
    """Read float32 as float64: models cast norms, softmax and rotary angles to float32 by name.

    Without it the reference would carry float32's own rounding in those places.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        named = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **named)


def _wide(value: object) -> object:
    return torch.float64 if value is torch.float32 else value
