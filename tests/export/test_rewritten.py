"""What is rewritten while a model is traced: equal values, and operators that can be exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.export.onnx.rewritten import Rewritten
from kilodelta.export.onnx.trace import trace

MASK = torch.tensor([[1, 0, 1]])
CALLS = (
    lambda: 1.0 - MASK,
    lambda: MASK - 0.5,
    lambda: MASK * 2.5,
    lambda: 2.5 * MASK,
    lambda: torch.rsub(MASK, 0.5),
    lambda: torch.sub(MASK, 0.5, alpha=3),
    lambda: 3 - MASK,
    lambda: 1.0 - MASK.double(),
    lambda: torch.polar(torch.ones(2, 3), torch.ones(2, 3))[:, :, None],
    lambda: torch.polar(torch.ones(2, 3), torch.ones(2, 3)).unsqueeze(1),
    lambda: torch.cat(torch.arange(7).chunk(3)),
)


@pytest.mark.parametrize("call", CALLS)
def test_values_and_types_stay(call: Any) -> None:
    expected = call()
    with Rewritten():
        found = call()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected)


class Awkward(torch.nn.Module):
    """Three lines of transformers: ProphetNet's mask and chunks, and Llama 4's rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Linear(4, 4)

    def forward(self, x: Any, mask: Any) -> dict[str, Any]:
        weights = 1.0 - mask[:, :, None].repeat(1, 1, 2)
        turn = torch.polar(torch.ones(x.shape[1], 2), torch.arange(x.shape[1])[:, None] * 0.3)
        pairs = torch.view_as_complex(self.module(x).reshape(*x.shape[:-1], 1, 2, 2))
        turned = torch.view_as_real(pairs * turn[None, :, None, :]).flatten(2)
        first, second = torch.cat([turned, turned * weights[:, :, :1]], dim=1).chunk(2, dim=1)
        return {"y": first + 2 * second}


@pytest.mark.slow
def test_what_torch_alone_cannot_export_runs_at_another_size(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import onnx_ir as ir

    from kilodelta.export.onnx.clean import clean

    def batch(rows: int, length: int) -> dict[str, Any]:
        chance = torch.Generator().manual_seed(length)
        mask = torch.randint(2, (rows, length), generator=chance)
        return {"x": torch.randn(rows, length, 4, generator=chance), "mask": mask}

    view = Awkward().eval()
    axes = {name: {0: "batch", 1: "length"} for name in ("x", "mask")}
    made = trace(view, batch(3, 7), axes)
    assert made.frozen == ()
    clean(made.model)
    ir.save(made.model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for rows, length in ((3, 7), (1, 5), (2, 12)):
        given = batch(rows, length)
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        with torch.no_grad():
            np.testing.assert_allclose(found, view(**given)["y"].numpy(), atol=1e-5)
