"""Axes vary where the model and the exported graph take other sizes; what cannot is fixed, said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

from kilodelta.errors import ExportError, InputError
from kilodelta.export.manifest.facts import Sizes
from kilodelta.export.onnx.axes import LONGEST, vary
from kilodelta.export.onnx.trace import Positional
from kilodelta.models import LoadedModel, outputs

Sized = Mapping[str, Sizes]


class Net(nn.Module):
    """A layer, and what a subclass makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.table = nn.Embedding(20, 4)
        self.places = nn.Embedding(16, 4)


class Features(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": self.lin(x)}


class OneRow(Net):
    def forward(self, x: Tensor) -> Any:
        return {"logits": self.lin(x.reshape(1, 5, 4))}


class Texts(Net):
    """Two texts of any lengths, the first with its mask and a flag per token."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, keep: Tensor, other: Tensor
    ) -> Any:
        hidden = self.table(input_ids) * attention_mask[..., None] * keep[..., None]
        return {"tokens": self.lin(hidden), "second": self.lin(self.table(other))}


class Positions(Net):
    def forward(self, input_ids: Tensor) -> Any:
        at = torch.arange(input_ids.shape[1])
        return {"logits": self.lin(self.table(input_ids) + self.places(at))}


class Picture(Net):
    def forward(self, image: Tensor) -> Any:
        return {"logits": self.lin(image.mean((2, 3)))}


class Square(Net):
    def forward(self, image: Tensor) -> Any:
        return {"logits": self.lin(image.reshape(len(image), 4, 64).mean(2))}


class Chunks(Net):
    """Takes lengths of whole chunks of four."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.lin(x.reshape(len(x), -1, 4, 4).mean(2))}


def loaded(module: nn.Module, **more: Any) -> LoadedModel:
    torch.manual_seed(0)
    names = {name: name for name in module.state_dict()}
    return LoadedModel(source="m", module=module.eval(), kind="any", names=names, **more)


def found(module: nn.Module, by_hand: Sized | None = None, /, **batch: Tensor) -> Any:
    return vary(loaded(module), batch, by_hand or {})


def ids(*shape: int) -> Tensor:
    return torch.randint(20, shape)


def test_rows_and_time_vary_and_features_do_not() -> None:
    variation = found(Features(), x=torch.randn(6, 10, 4))
    assert variation.axes() == {"x": {0: "batch", 1: "time"}}
    assert variation.group("batch").sizes == (1, 8, 32)
    assert variation.group("time").sizes == (5, 10, 20)
    assert variation.fixed == ()
    assert found(Features(), x=torch.randn(6, 4)).axes() == {"x": {0: "batch"}}


@pytest.mark.parametrize("rows", [1, 5])
def test_a_model_of_one_row_is_fixed_and_said(rows: int) -> None:
    variation = found(OneRow(), x=torch.randn(rows, 5, 4))
    assert variation.axes() == {"x": {}}
    assert variation.batch["x"].shape == (1, 5, 4)
    assert variation.fixed == ("batch is 1: the model takes no other number of rows",)
    same = found(OneRow(), {"batch": (1, 1, 1)}, x=torch.randn(1, 5, 4))
    assert same.groups == ()
    with pytest.raises(InputError, match="OneRow takes 1 row and no other number"):
        found(OneRow(), {"batch": (1, 2, 3)}, x=torch.randn(1, 5, 4))


@pytest.mark.parametrize("length", [7, 9], ids=["of one length", "of two lengths"])
def test_inputs_share_a_name_only_where_the_model_ties_them(length: int) -> None:
    """The text, its mask and its flags are as long as each other; the other text need not be."""
    batch = {
        "input_ids": ids(2, 7),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "keep": torch.ones(2, 7, dtype=torch.bool),
        "other": ids(2, length),
    }
    axes = found(Texts(), **batch).axes()
    assert {name: named[1] for name, named in axes.items()} == {
        "input_ids": "sequence",
        "attention_mask": "sequence",
        "keep": "sequence",
        "other": "other_sequence",
    }


def test_two_inputs_given_as_one_tensor_stay_two() -> None:
    text = ids(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    variation = found(Texts(), input_ids=text, attention_mask=mask, keep=mask, other=text)
    shown = variation.resized({"sequence": 3, "other_sequence": 5})
    assert [tuple(t.shape) for t in shown.values()] == [(2, 3), (2, 3), (2, 3), (2, 5)]


def test_texts_go_as_far_as_the_model_does() -> None:
    """Without a stated limit the position table is found by asking; it ends at 16."""
    variation = found(Positions(), input_ids=ids(2, 5))
    assert variation.group("sequence").sizes == (1, 16, 16)
    stated = vary(loaded(Positions(), max_length=12), {"input_ids": ids(2, 5)}, {})
    assert stated.group("sequence").sizes == (1, 12, 12)
    with pytest.raises(InputError, match="Positions does not take sequence 17"):
        found(Positions(), {"sequence": (1, 4, 17)}, input_ids=ids(2, 5))
    by_hand = found(Positions(), {"sequence": (2, 4, 16)}, input_ids=ids(2, 5))
    assert by_hand.group("sequence").sizes == (2, 4, 16)
    endless = found(Texts(), **dict.fromkeys(("attention_mask", "keep"), torch.ones(1, 4).long()),
                    input_ids=ids(1, 4), other=ids(1, 6))  # fmt: skip
    assert endless.group("sequence").sizes == (1, 64, LONGEST)


def test_images_vary_where_it_is_asked_for() -> None:
    image = torch.randn(2, 4, 8, 8)
    variation = found(Picture(), image=image)
    assert variation.axes() == {"image": {0: "batch"}}
    [note] = variation.fixed
    assert "image is fixed at height 8 and width 8; --profile height=MIN,OPT,MAX" in note
    asked = {"height": (4, 8, 12), "width": (8, 8, 16)}
    variation = found(Picture(), asked, image=image)
    assert variation.axes() == {"image": {0: "batch", 2: "height", 3: "width"}}
    assert variation.fixed == ()
    traced = {group.name: group.traced for group in variation.groups}
    assert traced["height"] != traced["width"] != 8, "no size that looks like another"
    assert found(Square(), image=image).fixed == ()
    with pytest.raises(InputError, match="Square takes image of no other height"):
        found(Square(), {"height": (4, 8, 16)}, image=image)


def test_lengths_that_come_in_chunks() -> None:
    variation = found(Chunks(), x=torch.randn(2, 8, 4))
    assert variation.group("time").sizes == (4, 8, 16)
    with pytest.raises(InputError, match="Chunks does not take time 6"):
        found(Chunks(), {"time": (4, 6, 8)}, x=torch.randn(2, 8, 4))


def test_names_that_no_axis_has_and_batches_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="no input has an axis frames that varies") as error:
        found(Features(), {"frames": (1, 2, 3)}, x=torch.randn(2, 4))
    assert error.value.fix == "the axes that vary are batch"
    with pytest.raises(InputError, match=r"Features does not compute with x \(2, 5\): "):
        found(Features(), x=torch.randn(2, 5))


# graphs


class Late(Net):
    """A branch for sizes beyond eight, which a graph does not hold beside the other one."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.lin(x) * (2 if x.shape[1] > 8 else 1)}


class Recurrent(Net):
    """A GRU below attention, of which torch's exporter freezes the length."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        hidden, _ = self.gru(x)
        return {"logits": self.attention(hidden, hidden, hidden)[0]}


class Siamese(Net):
    def forward(self, left: Tensor, right: Tensor) -> Any:
        return {"score": torch.relu(self.lin(left)) - 2 * torch.tanh(self.lin(right))}


def template_of(
    module: nn.Module, batch: Mapping[str, Tensor], sizes: Sized | None = None
) -> tuple[Any, LoadedModel]:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from kilodelta.export.onnx.make import export_template

    model = loaded(module)
    return export_template(model, dict(batch), sizes=sizes), model


def runs(
    template: Any, model: LoadedModel, folder: Path, batches: list[dict[str, Tensor]]
) -> list[float]:
    """The errors of the filled graph against torch, by batch."""
    import onnxruntime
    from safetensors.torch import save_file

    from kilodelta.export.onnx.save import save
    from kilodelta.export.onnx.template import fill_template

    save_file(model.module.state_dict(), folder / "w.safetensors")
    (path,) = save(fill_template(template, folder / "w.safetensors"), folder / "m.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    errors = []
    for batch in batches:
        made = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        with torch.no_grad():
            wanted = [tensor.numpy() for tensor in outputs(model, batch).values()]
        errors += [float(np.abs(a - b).max()) for a, b in zip(made, wanted, strict=True)]
    return errors


def test_a_graph_runs_at_every_size_that_it_declares(tmp_path: Path) -> None:
    """Two inputs that were given as one tensor included."""
    x = torch.randn(1, 6, 4)
    template, model = template_of(Siamese(), {"left": x, "right": x})
    shapes = [port.shape for port in template.inputs]
    assert shapes == [("batch", "time", 4)] * 2
    assert template.profile()["left"] == ((1, 3, 4), (8, 6, 4), (32, 12, 4))
    batches = [
        {name: torch.randn(rows, time, 4) for name in ("left", "right")}
        for rows, time in ((1, 1), (5, 6), (2, 17))
    ]
    assert max(runs(template, model, tmp_path, batches)) < 1e-5


@pytest.mark.parametrize(
    ("make", "batch", "shape"),
    [
        pytest.param(Late, {"x": torch.randn(2, 6, 4)}, ("batch", 6, 4), id="a branch"),
        pytest.param(
            Recurrent,
            {"x": torch.randn(2, 5, 4)},
            ("batch", 5, 4),
            id="a frozen length",
            marks=pytest.mark.slow,  # torch unrolls the GRU for 20 seconds
        ),
        pytest.param(OneRow, {"x": torch.randn(1, 5, 4)}, (1, 5, 4), id="one row"),
    ],
)
def test_what_cannot_vary_in_the_graph_is_fixed_and_said(
    make: Callable[[], nn.Module], batch: dict[str, Tensor], shape: Any, tmp_path: Path
) -> None:
    template, model = template_of(make(), batch)
    [port] = template.inputs
    assert port.shape == shape
    assert len(template.notes) == 1
    assert ("batch is 1" if make is OneRow else f"time is fixed at {shape[1]}") in template.notes[0]
    assert max(runs(template, model, tmp_path, [batch])) < 1e-5


def test_an_axis_that_was_asked_for_and_cannot_vary_is_refused() -> None:
    batch = {"x": torch.randn(2, 6, 4)}
    with pytest.raises(ExportError, match="time cannot vary in the exported graph") as error:
        template_of(Late(), batch, {"time": (4, 6, 12)})
    assert "leave time out of --profile" in error.value.fix


def test_a_graph_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kilodelta.export.onnx import named
    from kilodelta.export.onnx.clean import clean

    def wrong(model: Any) -> None:
        """A subtraction where the model adds."""
        clean(model)
        for node in model.graph.all_nodes():
            if node.op_type == "Sub":
                node.op_type = "Add"

    monkeypatch.setattr(named, "clean", wrong)
    x = torch.randn(2, 6, 4)
    with pytest.raises(ExportError, match=r"does not compute Siamese: score is off by \d"):
        template_of(Siamese(), {"left": x, "right": x})


def test_a_graph_that_was_not_tried_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    from kilodelta.export.onnx import make

    monkeypatch.setattr(make, "can_try", lambda dtype: False)
    template, _ = template_of(Features(), {"x": torch.randn(2, 4)})
    assert template.notes[0].startswith("float32 was not run at other sizes")


def test_axes_of_one_name_are_declared_to_have_one_size() -> None:
    class Sum(torch.nn.Module):
        def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": batch["a"].sum() + batch["b"].sum()}

    axes = {"a": {0: "batch"}, "b": {0: "batch", 1: "width"}}
    view = Positional(Sum(), ("a", "b"), axes)
    assert view(torch.ones(2), torch.ones(2, 3))[0] == 8
    with pytest.raises(RuntimeError):
        view(torch.ones(2), torch.ones(3, 3))
