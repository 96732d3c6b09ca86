"""What torch cannot trace is refused by a sentence that says what the model does."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import torch
from torch import Tensor, nn

from kilodelta.errors import ExportError
from kilodelta.export.onnx.trace import trace
from kilodelta.models import LoadedModel


class Decides(nn.Module):
    """Takes a branch by what its input holds, as LED does where tokens attend globally."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x + 1 if (x > 0).any().item() else x}


class Converts(nn.Module):
    """Converts a layer of its own while it computes, as NLLB's router does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.layer = self.layer.to(x.dtype)
        return {"y": self.layer(x)}


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Decides(), r"cannot export Decides: its forward decides by what its inputs hold, at \S+"),
        (Converts(), r"cannot export Converts: its forward converts weights of its own"),
    ],
    ids=["decides", "converts"],
)
def test_the_sentence_says_what_cannot_be_traced(module: nn.Module, said: str) -> None:
    loaded = LoadedModel(source="", module=module.eval(), kind="any", names={})
    with pytest.raises(ExportError, match=said) as error:
        trace(loaded.view(), {"x": torch.ones(2, 3)}, {"x": {0: "batch"}})
    assert error.value.fix.startswith("give a module without it by --model, or use the checkpoint")
