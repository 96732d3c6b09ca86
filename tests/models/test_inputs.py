"""Reading inputs: what is read, and what is refused by name before long work begins."""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kilodelta.errors import InputError
from kilodelta.models.entry import call_entry, find_entry, is_entry
from kilodelta.models.inputs.check import try_one
from kilodelta.models.inputs.read import read_inputs, tokenize
from kilodelta.models.inputs.sources import ArraySource, CalledSource, TextSource, open_source
from kilodelta.models.inputs.texts import read_texts
from kilodelta.models.loaded import LoadedModel


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.layer(image).mean((2, 3))
        return found


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.table(input_ids)
        return found


class Pairs(nn.Module):
    """Takes at least two rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x[0] + x[1:]


def loaded(module: nn.Module, kind: Any = "any", **more: Any) -> LoadedModel:
    return LoadedModel(source=type(module).__name__, module=module, kind=kind, names={}, **more)


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def error(call: Callable[[], Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.fix
    return caught.value


def test_arrays_become_batches_in_their_order(tmp_path: Path) -> None:
    ids = np.arange(14, dtype=np.int32).reshape(7, 2) % 10
    path = saved(tmp_path / "a.npz", input_ids=ids, attention_mask=np.ones((7, 2), bool))
    batches = read_inputs(path, loaded(Tokens(), "text"), batch_size=3, limit=5)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 2]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), torch.from_numpy(ids[:5]))
    assert batches[0]["input_ids"].dtype == torch.int64
    assert batches[0]["attention_mask"].dtype == torch.bool


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"image": np.zeros((2, 3, 4, 4), np.uint8)}, "cannot compute with image int64 (1, 3, 4"),
        ({"image": np.zeros((2, 4, 4, 3), np.float32)}, "cannot compute with image float32"),
        ({"image": np.full((2, 3, 4, 4), np.nan, np.float32)}, "image holds NaN in row 0"),
        ({"pixels": np.zeros((2, 3, 4, 4), np.float32)}, "lacks image and holds pixels"),
        ({"image": np.array(1.0)}, "holds no rows: image float64 ()"),
        ({"image": np.zeros((0, 3), np.float32)}, "holds no rows"),
        ({"image": np.zeros((2, 3), complex)}, "image is an array of complex128"),
    ],
)
def test_arrays_that_a_module_cannot_take(
    arrays: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.npz", **arrays)
    assert expected in error(lambda: read_inputs(path, loaded(Pixels()))).what


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"input_ids": np.zeros((2, 3), np.float32)}, "input_ids has shape (2, 3) of float32"),
        ({"input_ids": np.zeros(5, np.int64)}, "input_ids has shape (5,) of int64"),
        ({"input_ids": np.array([[1, 10]])}, "holds 10, which is no token of Tokens"),
        ({"input_ids": np.array([[1, -2]])}, "holds -2, which is no token of Tokens"),
        ({"input_ids": np.zeros((2, 3), int), "attention_mask": np.ones((3, 3), int)}, "differ"),
        ({"attention_mask": np.ones((3, 3), int)}, "lacks input_ids"),
        ({"input_ids": np.zeros((2, 0), int)}, "input_ids has shape (2, 0)"),
        ({"input_ids": np.full((2, 3), 2**64 - 1, np.uint64)}, "holds 18446744073709551615"),
        (
            {"input_ids": np.ones((2, 4), int), "attention_mask": np.ones((2, 3), int)},
            "input_ids has 4 tokens a row, attention_mask has 3",  # Tokens would not look at it
        ),
    ],
)
def test_arrays_that_are_no_texts(arrays: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", **arrays)
    assert expected in error(lambda: read_inputs(path, loaded(Tokens(), "text"))).what


def test_raw_pixels_of_an_image_model_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", pixel_values=np.zeros((2, 3, 4, 4), np.uint8))

    class Image(Pixels):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return super().forward(pixel_values)

    found = error(lambda: read_inputs(path, loaded(Image(), "image")))
    assert "pixel_values has shape (2, 3, 4, 4) of uint8" in found.what
    assert "scaled and normalised" in found.fix


def test_float_ids_of_any_module_are_a_sentence(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", input_ids=np.zeros((2, 3), np.float32))
    found = error(lambda: read_inputs(path, loaded(Tokens())))
    assert "Tokens cannot compute with input_ids float32 (1, 3)" in found.what


def test_a_model_may_need_more_than_one_row(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", x=np.zeros((4, 3), np.float32))
    assert len(read_inputs(path, loaded(Pairs()))) == 1


class Hears(nn.Module):
    """Computes with sounds; as a class of transformers, it asks for none in its signature."""

    config, main_input_name = None, "input_features"

    def forward(
        self, input_features: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        assert input_features is not None, "'NoneType' object has no attribute 'shape'"
        return input_features


def test_texts_for_a_model_that_hears_are_named() -> None:
    """The module's own complaint, of an attribute of None, says nothing to a user."""
    row = {"attention_mask": torch.ones(1, 4)}
    found = error(lambda: try_one(row, loaded(Hears()), "texts.jsonl"))
    assert found.what == "texts.jsonl makes attention_mask, and Hears wants input_features"
    assert found.fix.startswith("give sounds for input_features")
    try_one({**row, "input_features": torch.ones(1, 2)}, loaded(Hears()), "calls.jsonl")


class Reads(nn.Module):
    """Reads up to 5 tokens and their mask."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        table = torch.arange(5.0)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return table[: input_ids.shape[1]] * input_ids * mask


def test_rows_beyond_the_positions_are_counted(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", input_ids=np.ones((2, 6), int))
    found = error(lambda: read_inputs(path, loaded(Reads(), "text", max_length=5)))
    assert found.what.endswith("a.npz holds rows of 6 tokens, and Reads has positions for 5")
    assert found.fix == "cut the rows to 5 tokens"


def test_a_mask_of_another_length_is_counted(tmp_path: Path) -> None:
    """As generation has it: the tokens of the cache and the new ones."""
    arrays = {"input_ids": np.ones((2, 4), int), "attention_mask": np.ones((2, 7), int)}
    found = error(lambda: read_inputs(saved(tmp_path / "a.npz", **arrays), loaded(Reads(), "text")))
    assert "input_ids has 4 tokens a row, attention_mask has 7" in found.what
    assert found.fix.startswith("give attention_mask for the same tokens")


def test_a_later_batch_of_another_shape_is_tried(mine: Path) -> None:
    (mine / "short_later.py").write_text(
        "import torch\n"
        "def rows():\n"
        "    return [{'x': torch.ones(2, 1, n)} for n in (9, 12, 2, 8)]\n"
    )

    class Kernel(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    found = error(lambda: read_inputs("short_later:rows", loaded(Kernel(1, 1, 3))))
    assert "cannot compute with x float32 (1, 1, 2): Calculated padded input size" in found.what


class Masks(nn.Module):
    """Multiplies by numbers that it draws, unless it is given some; draws others for nothing."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        torch.rand(3)
        return {"y": x * (torch.rand_like(x) if noise is None else noise)}


def test_a_model_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    """ViT-MAE chooses the patches that it sees at random; with its `noise` it is a function."""
    x = np.ones((4, 3), np.float32)
    found = error(lambda: read_inputs(saved(tmp_path / "a.npz", x=x), loaded(Masks())))
    assert "Masks draws random numbers while it computes (rand, rand_like): y differs" in found.what
    assert "as an input, if it is one of noise, or" in found.fix
    [batch] = read_inputs(saved(tmp_path / "b.npz", x=x, noise=x), loaded(Masks()))
    assert set(batch) == {"x", "noise"}


class Draws(nn.Module):
    """Adds a number that is drawn by a function, and by none of torch's own."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": functional.dropout(x, training=False) * (1 + self.draw())}


_OWN = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("draw", "by"),
    [
        (np.random.rand, " (numpy.random): "),
        (random.random, " (random): "),
        (lambda: torch.rand((), generator=_OWN).item(), " (rand): "),
        (itertools.count().__next__, ": "),
    ],
    ids=["numpy", "random", "its own generator", "a counter"],
)
def test_numbers_are_drawn_by_any_generator(
    draw: Callable[[], float], by: str, tmp_path: Path
) -> None:
    path = saved(tmp_path / "a.npz", x=np.ones((4, 3), np.float32))
    found = error(lambda: read_inputs(path, loaded(Draws(draw))))
    assert f"Draws draws random numbers while it computes{by}y differs each time" in found.what


def test_a_model_that_only_rounds_otherwise_draws_nothing(tmp_path: Path) -> None:
    """Sums in another order, as libraries take them where memory lies otherwise."""
    path = saved(tmp_path / "a.npz", x=np.ones((4, 3), np.float32))
    steps = itertools.cycle([0.0, 2.0**-22])
    assert read_inputs(path, loaded(Draws(steps.__next__)))


def test_large_arrays_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", input_ids=np.zeros(50_000_000, np.uint8))
    import tracemalloc

    tracemalloc.start()
    try:
        error(lambda: read_inputs(path, loaded(Tokens(), "text")))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_texts_that_no_tokenizer_takes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "\\ud800"}\n')
    assert ":2 holds half of a surrogate pair" in error(lambda: read_texts(path)).what
    os.mkfifo(tmp_path / "pipe.txt")
    assert "not a regular file" in error(lambda: read_texts(tmp_path / "pipe.txt")).what
    path.write_text('{"words": "a"}\n')
    assert "it holds words" in error(lambda: read_texts(path)).what
    assert read_texts(path, field="words") == ["a"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[1]", ":1 is a list, not an object"),
        ("null", ":1 is null, not an object"),
        ("3", ":1 is a number, not an object"),
        ('{"text": 3}', ":1: 'text' is a number, not text"),
        ('{"text": null}', ":1: 'text' is null, not text"),
        ('{"text": [true]}', ":1: 'text' is a list, not text"),
        ("[" * 100_000, ":1 is nested too deeply"),
        ("{", ":1 is not JSON: "),
    ],
)
def test_lines_that_hold_no_text(line: str, expected: str, tmp_path: Path) -> None:
    """In JSON's words, not in Python's."""
    path = tmp_path / "A.JSONL"  # records, as of a suffix in small letters
    path.write_text(line + "\n")
    assert expected in error(lambda: open_source(path)).what


def test_a_tokenizer_s_own_complaint_is_a_sentence() -> None:
    def tokenizer(texts: list[str], **options: Any) -> dict[str, Tensor]:
        raise ValueError("Asking to pad but the tokenizer does not have a padding token.\nmore")

    model = loaded(Tokens(), "text", tokenizer=tokenizer, max_length=8)
    found = error(lambda: tokenize(model, ["a"]))
    assert found.what.endswith("cannot make a batch: Asking to pad but the tokenizer does not"
                               " have a padding token.")  # fmt: skip
    assert "texts of 9 tokens" in error(lambda: tokenize(model, ["a"], max_length=9)).what
    assert "no tokenizer" in error(lambda: tokenize(loaded(Tokens(), "text"), ["a"])).what


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the user's in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import numpy as np\n"
        "number = 3\n"
        "def batches():\n    for n in (2, 3):\n        yield {'input_ids': np.zeros((n, n), int)}\n"
        "def bare():\n    return [np.ones((2, 2), int)]\n"
        "def one():\n    return {'input_ids': np.zeros((2, 2), int)}\n"
        "def late():\n    yield {'input_ids': np.zeros((2, 2), int)}\n    raise KeyError('gone')\n"
        "def fails():\n    return 1 / 0\n"
    )
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.mark.usefixtures("mine")
def test_functions_of_the_user() -> None:
    model = loaded(Tokens(), "text")
    assert [b["input_ids"].shape[0] for b in read_inputs("mine:batches", model)] == [2, 3]
    assert [b["input_ids"].shape[0] for b in read_inputs("mine:batches", model, limit=3)] == [2, 1]
    assert read_inputs("mine:bare", model)[0]["input_ids"].sum() == 4
    assert "returned a dict" in error(lambda: read_inputs("mine:one", model)).what
    assert "fails with ZeroDivisionError" in error(lambda: read_inputs("mine:fails", model)).what
    found = error(lambda: read_inputs("mine:late", model))
    assert "fails with KeyError: 'gone'" in found.what
    assert 'python -c "import mine; list(mine.late())"' in found.fix
    assert "mine has no function number" in error(lambda: find_entry("mine:number")).what
    assert "there is no module absent" in error(lambda: find_entry("absent:f")).what
    assert "fails with ZeroDivisionError" in error(lambda: call_entry("mine:fails")).what


def test_a_module_with_a_fault_is_a_sentence(mine: Path) -> None:
    (mine / "broken.py").write_text("def f(:\n")
    assert "broken:f fails with SyntaxError" in error(lambda: find_entry("broken:f")).what


@pytest.mark.usefixtures("mine")
def test_sources_are_judged_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"t": f"{i}"}) + "\n" for i in range(5)))
    texts = open_source(tmp_path / "a.jsonl", field="t", limit=3)
    assert isinstance(texts, TextSource)
    assert (texts.rows, texts.texts) == (3, ("0", "1", "2"))
    arrays = open_source(saved(tmp_path / "a.npz", x=np.zeros((4, 2))), limit=9)
    assert isinstance(arrays, ArraySource)
    assert arrays.rows == 4
    called = open_source("mine:fails")
    assert isinstance(called, CalledSource)
    assert called.rows is None
    uneven = saved(tmp_path / "b.npz", x=np.zeros((4, 2)), y=np.zeros(3))
    assert "rows differ: x float64 (4, 2), y" in error(lambda: open_source(uneven)).what
    assert "is no kind of input" in error(lambda: open_source("a.csv")).what
    assert "is no file" in error(lambda: open_source("absent.txt")).what
    assert "empty text" in error(lambda: open_source("")).what  # not the working directory
    assert not is_entry("a:b:c")


def test_texts_are_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of rows ends the reading: what follows, of whatever size and kind, costs nothing."""
    place = tmp_path / "texts.txt"
    place.write_bytes("\ufeffone\n two \n".encode() + b"\xff" * 1000)
    assert read_texts(place, limit=2) == ["one", "two"]
    with pytest.raises(InputError, match="not UTF-8: byte 0xff at 13"):
        read_texts(place)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(InputError, match="not a regular file"):
        read_texts(tmp_path / "pipe.txt")


def test_a_configuration_of_any_bytes_says_nothing(tmp_path: Path) -> None:
    from kilodelta.files.checkpoint import Checkpoint, read_config
    from tests.support import making

    base = Checkpoint.open(making.folder(tmp_path / "base", making.model()))
    assert read_config(base) == {"model_type": "x"}
    place = tmp_path / "base" / "config.json"
    for data in (b"[" * 100_000, b"\xff", b"9" * 10_000, b"[]"):
        place.write_bytes(data)
        assert read_config(base) == {}
    place.unlink()
    os.mkfifo(place)
    assert read_config(base) == {}


def test_a_tokenizer_that_panics_or_lies_gives_a_sentence(tmp_path: Path) -> None:
    """A panic in Rust code comes as an exception that is no `Exception`; a limit may be a text."""
    from kilodelta.models import open_model
    from tests.support import pico

    class PanicException(BaseException):
        pass

    def raising(error: BaseException) -> LoadedModel:
        def tokenizer(*_: Any, **__: Any) -> None:
            raise error

        return LoadedModel(**{**vars(loaded), "tokenizer": tokenizer})

    folder = pico.bert(tmp_path / "model")
    place = folder / "tokenizer_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"model_max_length": "many"}))
    loaded = open_model(folder)
    assert loaded.max_length == pico.POSITIONS
    with pytest.raises(InputError, match="cannot make a batch: no entry"):
        tokenize(raising(PanicException("no entry")), ["rain"])
    with pytest.raises(KeyboardInterrupt):
        tokenize(raising(KeyboardInterrupt()), ["rain"])


def test_a_main_input_without_annotation_is_taken(tmp_path: Path) -> None:
    """SigLIP's vision tower annotates nothing: it was said to need what it was refused."""

    class Tower(nn.Module):
        config, main_input_name = object(), "pixel_values"

        def forward(self, pixel_values, interpolate=False):  # type: ignore[no-untyped-def]
            return pixel_values.mean((1, 2, 3))

    model = loaded(Tower(), "image")
    assert (model.accepts, model.required) == (("pixel_values",), ("pixel_values",))
    images = np.zeros((2, 3, 4, 4), np.float32)
    [batch] = read_inputs(saved(tmp_path / "in.npz", pixel_values=images), model)
    assert set(batch) == {"pixel_values"}
