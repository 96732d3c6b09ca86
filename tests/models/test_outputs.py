"""Every tensor that a model returns has a name, is exported, and can be chosen."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor, nn

from kilodelta.errors import InputError
from kilodelta.models import LoadedModel, open_model, outputs
from kilodelta.models.heads import choose, flatten
from tests.support import pico

X = torch.arange(12, dtype=torch.float32).reshape(3, 4)
Boxes = namedtuple("Boxes", ("corners", "scores"))


@dataclass
class Detection:
    logits: Tensor
    boxes: Any = None


def zeros(count: int) -> list[Tensor]:
    return [torch.full((1,), float(index)) for index in range(count)]


def returned(result: Callable[..., Any]) -> LoadedModel:
    """A model that returns what `result` makes of its linear layer's output and its input."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 2)
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Any:
            return result(self.lin(x), x, self.scale)

    torch.manual_seed(0)
    net = Net().eval()
    names = {name: name for name in net.state_dict()}
    return LoadedModel(source="net", module=net, kind="any", names=names)


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (lambda a, b, c: a, ["output"]),
        (lambda a, b, c: (a, b), ["output_0", "output_1"]),
        (lambda a, b, c: [a, {"x": b}], ["output_0", "output_1.x"]),
        (lambda a, b, c: {"logits": a, "pred_boxes": b}, ["logits", "pred_boxes"]),
        (lambda a, b, c: {"last_hidden_state": a, "aux": b}, ["last_hidden_state", "aux"]),
        (lambda a, b, c: {"a": {"logits": a, "more": [b]}}, ["a.logits", "a.more.0"]),
        (lambda a, b, c: {"a": a, "none": None, "n": 3, "t": "x", "c": object()}, ["a"]),
        (lambda a, b, c: Boxes(a, (b, c)), ["corners", "scores.0", "scores.1"]),
        (lambda a, b, c: Detection(a, Boxes(b, c)), ["logits", "boxes.corners", "boxes.scores"]),
        (lambda a, b, c: {1: a, "two": {2: b}}, ["1", "two.2"]),
    ],
)  # fmt: skip
def test_every_tensor_has_a_name(result: Callable[..., Any], names: list[str]) -> None:
    assert list(flatten(result(*zeros(3)))) == names


def test_a_result_without_tensors_or_with_one_name_twice_is_refused() -> None:
    with pytest.raises(InputError, match="returns a dict that holds no tensor"):
        flatten({"a": None, "b": {}})
    one, two = zeros(2)
    with pytest.raises(InputError, match=r"two outputs named a\.b"):
        flatten({"a.b": one, "a": {"b": two}})
    with pytest.raises(InputError, match="two outputs named 1"):
        flatten({1: one, "1": two})


def test_outputs_are_chosen_by_name_and_glob() -> None:
    named = dict(zip(("logits", "aux.logits", "aux.boxes"), zeros(3), strict=True))
    assert list(choose(named, ["aux.*"])) == ["aux.logits", "aux.boxes"]
    assert list(choose(named, ["aux.boxes", "logits"])) == ["logits", "aux.boxes"]
    with pytest.raises(InputError, match="no output box") as error:
        choose(named, ["logits", "box"])
    assert "logits, aux.logits, aux.boxes" in error.value.fix


def test_a_view_returns_all_outputs_or_those_chosen() -> None:
    loaded = returned(lambda a, b, c: {"logits": a, "aux": {"scale": c, "sum": b.sum(1)}})
    found = outputs(loaded, {"x": X})
    assert list(found) == ["logits", "aux.scale", "aux.sum"]
    assert torch.equal(found["aux.sum"], X.sum(1))
    assert list(outputs(loaded.choosing(["aux.sum"]), {"x": X})) == ["aux.sum"]
    with pytest.raises(InputError, match="no output boxes"):
        outputs(loaded.choosing(["boxes"]), {"x": X})


def test_an_output_that_bears_an_inputs_name_is_refused() -> None:
    loaded = returned(lambda a, b, c: {"y": a, "x": b})
    with pytest.raises(InputError, match="output x bears the name of an input"):
        outputs(loaded, {"x": X})
    assert list(outputs(loaded.choosing(["y"]), {"x": X})) == ["y"]


def test_hugging_face_classes_put_out_their_fields(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    ids = torch.tensor([[2, 7, 3]])
    bert = open_model(pico.bert(tmp_path / "bert"))
    assert list(outputs(bert, {"input_ids": ids})) == ["last_hidden_state", "pooler_output"]
    gpt2 = open_model(pico.gpt2(tmp_path / "gpt2"))
    assert list(outputs(gpt2, {"input_ids": ids})) == ["logits"], "no cache between steps"


def test_a_sentence_encoder_puts_out_its_embedding_and_others_on_request(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    loaded = open_model(pico.sentence_bert(tmp_path / "base"))
    batch = {"input_ids": torch.tensor([[2, 7, 3]]), "attention_mask": torch.tensor([[1, 1, 1]])}
    assert list(outputs(loaded, batch)) == ["sentence_embedding"]
    both = outputs(loaded.choosing(["sentence_embedding", "last_hidden_state"]), batch)
    assert list(both) == ["sentence_embedding", "last_hidden_state"]
    mean = nn.functional.normalize(both["last_hidden_state"].mean(1), dim=-1)
    assert torch.allclose(both["sentence_embedding"], mean, atol=1e-6)


def exported(loaded: LoadedModel, folder: Path, feeds: Mapping[str, Tensor]) -> dict[str, Any]:
    """The outputs by name of the model's ONNX file, by ONNX Runtime."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from safetensors.torch import save_file

    from kilodelta.export.onnx.make import export_template
    from kilodelta.export.onnx.save import save
    from kilodelta.export.onnx.template import fill_template

    save_file(loaded.module.state_dict(), folder / "weights.safetensors")
    template = export_template(loaded, dict(feeds))
    (path,) = save(fill_template(template, folder / "weights.safetensors"), folder / "m.onnx")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [port.name for port in session.get_outputs()]
    assert names == [port.name for port in template.outputs]
    found = session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize(
    "result",
    [
        lambda a, b, c: {"logits": a, "pred_boxes": b * 2},
        lambda a, b, c: {"logits": a, "same": a, "nested": {"again": [a, a]}},
        lambda a, b, c: {"logits": a, "passed_on": b},
        lambda a, b, c: {"logits": a, "weight": c},
        lambda a, b, c: {"logits": a, "constant": torch.ones(3)},
        lambda a, b, c: {"class": a.argmax(-1), "sure": a.amax(-1) > 0, "scores": a},
        lambda a, b, c: (a, b.sum()),
    ],
    ids=["two", "aliases", "an input", "a weight", "a constant", "integers", "a scalar"],
)
def test_the_onnx_file_holds_all_outputs(result: Callable[..., Any], tmp_path: Path) -> None:
    loaded = returned(result)
    with torch.no_grad():
        expected = outputs(loaded, {"x": X})
    found = exported(loaded, tmp_path, {"x": X})
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        wanted = tensor.detach().numpy()
        assert found[name].dtype == wanted.dtype, name
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, err_msg=name)


def test_the_onnx_file_holds_chosen_outputs_alone(tmp_path: Path) -> None:
    loaded = returned(lambda a, b, c: {"logits": a, "pred_boxes": b}).choosing(["pred_*"])
    assert list(exported(loaded, tmp_path, {"x": X})) == ["pred_boxes"]
