"""Run a torch module: as the float64 reference, and as plain torch in the other precisions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kilodelta.errors import InputError, KiloDeltaError, ProofError, one_line
from kilodelta.models import experts
from kilodelta.verify.runners import blockwise
from kilodelta.verify.runners.runner import Arrays, Batch, UnavailableError
from kilodelta.verify.runners.torch_modes import InOrder, Widen


class TorchRunner:
    """A module in one precision on one device; the module given is never changed.

    Args:
        module: takes named tensors.
        outputs: names of what a module returns as a tensor or a tuple; of a mapping, the entries
            to take.
        precision: `float64`, `float32`, `float16` or `bfloat16`. Floating inputs are cast to it,
            integers and booleans are left as they are.
        device: "cpu" or "cuda".
        in_order: add the terms of long sums and means one after another (`InOrder`).
    """

    def __init__(
        self,
        module: torch.nn.Module,
        outputs: Sequence[str],
        *,
        precision: str,
        device: str,
        in_order: bool = False,
    ) -> None:
        self.name = f"torch-{device}"
        self.precision = precision
        self._source, self._outputs, self._device = module, tuple(outputs), device
        self._in_order = in_order
        self._module: torch.nn.Module | None = None
        self._whole = False
        """Whether the module is converted as a whole, though it is large."""

    def available(self) -> KiloDeltaError | None:
        """Return None, or that torch sees no GPU."""
        if self._device == "cpu" or torch.cuda.is_available():
            return None
        return UnavailableError(
            "torch sees no CUDA device",
            fix="use a machine with an NVIDIA GPU and a CUDA build of torch",
        )

    def run(
        self,
        batch: Batch,
        *,
        rows: int | None = None,
        done: Callable[[int], object] = lambda count: None,
    ) -> Arrays:
        """Compute the outputs by name, as numpy arrays of their dtypes; bfloat16 becomes float32.

        Args:
            batch: the inputs by name, all with the same first axis.
            rows: compute so many rows at a time, for a model whose rows do not depend on each
                other; by default all at once.
            done: called after each pass with the number of rows computed so far.

        Raises:
            UnavailableError: torch has no kernel for this precision on this device, or no GPU.
            InputError: the model cannot compute these inputs.
            ProofError: the model does not return all outputs.
        """
        error = self.available()
        if error is not None:
            raise error
        total = len(next(iter(batch.values())))
        if rows is None or rows >= total:
            whole = self._pass(batch)
            done(total)
            return whole
        gathered: Arrays = {}
        for start in range(0, total, rows):
            part = self._pass({name: array[start : start + rows] for name, array in batch.items()})
            for name, values in part.items():
                if name not in gathered:
                    gathered[name] = np.empty((total, *values.shape[1:]), values.dtype)
                gathered[name][start : start + rows] = values
            done(min(start + rows, total))
        return gathered

    @property
    def module(self) -> torch.nn.Module:
        """The module in this precision on this device: a copy unless it is so already."""
        if self._module is None:
            self._module = self._source if self._is_ready() else self._converted()
        return self._module

    def _is_ready(self) -> bool:
        state = self._source.state_dict().values()
        if self.precision == "float64" and not experts.are(self._source, experts.EXACT):
            return False  # one that is float64 already as well: see `_converted`
        return not self._source.training and all(
            tensor.device.type == self._device
            and (tensor.dtype == self._dtype or not tensor.is_floating_point())
            for tensor in state
        )

    def _converted(self) -> torch.nn.Module:
        if self._whole or not self._is_blockwise():
            converted = copy.deepcopy(self._source).to(self._device, self._dtype).eval()
        else:
            converted = blockwise.widened(self._source).eval()
        if self.precision == "float64":
            # The experts' default, grouped_mm, has no float64 kernel. The loop over experts has
            # one, and does not gather a matrix for each token, as batched_mm does.
            experts.use(converted, experts.EXACT)
        return converted

    def _is_blockwise(self) -> bool:
        """Return whether float64 weights are made block by block, on the CPU where they are."""
        on_cpu = all(p.device.type == "cpu" for p in self._source.parameters())
        wide = self.precision == "float64" and self._device == "cpu"
        return wide and on_cpu and blockwise.is_large(self._source)

    def _pass(self, batch: Batch) -> Arrays:
        result = self._forward({name: self._tensor(array) for name, array in batch.items()})
        named = named_outputs(result, self._outputs)
        return {name: _array(tensor) for name, tensor in named.items()}

    def _forward(self, inputs: dict[str, Tensor]) -> object:
        try:
            with as_precision(self.precision, self._device), ExitStack() as stack:
                if self._in_order:
                    stack.enter_context(InOrder())
                return self.module(**inputs)
        except (KiloDeltaError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not self._whole and self._is_blockwise():
                # It may use a block's weights from outside the block, where they are narrow.
                self._whole, self._module = True, None
                return self._forward(inputs)
            if isinstance(error, RuntimeError) and "not implemented for" in str(error):
                raise UnavailableError(
                    f"torch on {self._device} cannot compute in {self.precision}: "
                    f"{one_line(error)}",
                    fix="verify on a GPU with --device cuda",
                ) from error
            shown = ", ".join(f"{n} {_kind(t)} {tuple(t.shape)}" for n, t in inputs.items())
            raise InputError(
                f"the model cannot compute {shown}: {one_line(error)}",
                fix="give inputs of the types and shapes that the model's forward takes",
            ) from error

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.array(array)).to(self._device)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _array(tensor: Tensor) -> NDArray[Any]:
    host = tensor.detach().cpu()
    array: NDArray[Any] = (host.float() if host.dtype == torch.bfloat16 else host).numpy()
    return array


def named_outputs(result: object, names: Sequence[str]) -> dict[str, Tensor]:
    """Return a module's return value by output name.

    Raises:
        ProofError: the module does not return all of `names`.
    """
    if not names:
        return {}
    if isinstance(result, Mapping):
        named = {name: result[name] for name in names if name in result}
    else:
        values = (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]
        named = dict(zip(names, values, strict=False))
    missing = [name for name in names if not isinstance(named.get(name), Tensor)]
    if missing:
        raise ProofError(
            f"the model does not return {', '.join(missing)}",
            fix="give the model whose outputs the artefact was exported with",
        )
    return named


@contextmanager
def as_precision(precision: str, device: str) -> Iterator[None]:
    """Compute without gradients, in nothing narrower than `precision` unless the model asks."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if device == "cuda":  # cuDNN's convolutions use TF32 by default
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
        if precision == "float64":
            stack.enter_context(Widen())
        yield
