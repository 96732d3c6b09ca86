"""Disturb what products and sums take in as rounding may have disturbed it: measure a condition.

Two correct programs for one model differ by where they round. How far their outputs then lie apart
is the model's doing: a logit that is the small difference of large terms, or a norm over nearly
equal values, magnifies what came before. One run of plain torch shows that magnification times its
own luck, which for an output of one number may be anything. Several runs, each with another
disturbance of the size that rounding has, show the magnification itself (Monte Carlo arithmetic:
Parker, Pierce and Eggert, https://doi.org/10.1109/5992.852391).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kilodelta.verify.runners.runner import UNIT_ROUNDOFF, Arrays, Batch
from kilodelta.verify.runners.torch_runner import TorchRunner

RUNS = 5
"""Noisy runs: so many that the second largest error of one number is rarely a lucky one."""

ROUNDINGS = 4.0
"""Roundings by which an operand may be off: a runtime may round up to 16 times between two products
(`kilodelta.verify.parity.gate`), and independent roundings add in quadrature."""

_aten = torch.ops.aten

_OPERANDS: Mapping[Any, tuple[int, ...]] = {
    # Weights are left alone: they are the same numbers in every program, and an operand's noise
    # already reaches each term of a product.
    _aten.mm: (0,),
    _aten.mv: (0, 1),
    _aten.dot: (0, 1),
    _aten.addmm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.baddbmm: (0, 1, 2),
    _aten.convolution: (0,),
    _aten._scaled_dot_product_flash_attention_for_cpu: (0, 1, 2),
    _aten._scaled_dot_product_efficient_attention: (0, 1, 2),
    _aten._scaled_dot_product_flash_attention: (0, 1, 2),
    _aten._fft_r2c: (0,),
    _aten._fft_c2c: (0,),
    # What cancels: a norm subtracts a mean, and terms of a sum may have both signs.
    _aten.native_layer_norm: (0,),
    _aten.native_group_norm: (0,),
    _aten.native_batch_norm: (0,),
    _aten.sum: (0,),
    _aten.mean: (0,),
}
"""By operator, which of its arguments are disturbed.

Others are not, for a reason: they compute positions, buckets and masks as well, where a change of
one rounding is no rounding that another program makes (a mask `1 - ones` is exactly zero).
"""


class RoundingNoise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Multiply operands by 1 + `ROUNDINGS` u e, with e uniform in [-1, 1].

    Whole numbers stay: zeros of ReLU, masks, counts and one-hot rows are exact in every program.

    Args:
        unit_roundoff: u, of the precision whose rounding is imitated.
        seed: another seed gives another disturbance.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here; True, the default, would import dynamo, which takes seconds."""
        return False

    def __init__(self, unit_roundoff: float, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size, self._seed = ROUNDINGS * unit_roundoff, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        places = _OPERANDS.get(func.overloadpacket)
        if places is not None:
            args = [self._disturbed(a) if i in places else a for i, a in enumerate(args)]
        elif func._can_decompose():  # in inference mode `linear` comes whole, not as a product
            with self:
                result = func.decompose(*args, **named)
            if result is not NotImplemented:
                return result
        return func(*args, **named)

    def _disturbed(self, value: object) -> object:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        if value.is_complex():
            return torch.view_as_complex(self._noisy(torch.view_as_real(value)))
        return self._noisy(value)

    def _noisy(self, value: Tensor) -> Tensor:
        if value.device not in self._generators:
            generator = torch.Generator(value.device).manual_seed(self._seed)
            self._generators[value.device] = generator
        noise = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        noise.uniform_(-self._size, self._size, generator=self._generators[value.device])
        # NaN and infinity are equal to their whole part, or no number at all: both stay.
        return torch.where(value == value.trunc(), value, torch.addcmul(value, value, noise))


def noisy_runs(
    runner: TorchRunner, batch: Batch, precision: str, *, rows: int | None = None
) -> list[Arrays]:
    """Run a module `RUNS` times, each with another rounding noise.

    Args:
        runner: the module in float64, so that nothing but the noise is added.
        batch: the inputs by name.
        precision: whose rounding is imitated.
        rows: rows per forward pass, as `TorchRunner.run` takes them.

    Example:
        >>> import numpy as np
        >>> norm = torch.nn.LayerNorm(4).eval()
        >>> runner = TorchRunner(norm, ["y"], precision="float64", device="cpu")
        >>> flat = {"input": np.array([[1.01, 1.02, 1.03, 1.04]])}  # the norm magnifies it 70 times
        >>> runs = [run["y"] for run in noisy_runs(runner, flat, "float32")]
        >>> off = float(np.abs(runs - runner.run(flat)["y"]).max())
        >>> 2**-24 * 10 < off < 2**-24 * 1000
        True
    """
    assert runner.precision == "float64"
    _ = runner.module  # converted before there is noise
    runs = []
    for seed in range(RUNS):
        with RoundingNoise(UNIT_ROUNDOFF[precision], seed):
            runs.append(runner.run(batch, rows=rows))
    return runs
