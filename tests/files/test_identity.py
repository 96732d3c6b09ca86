"""A model's root: by hand, then the same however the tensors lie."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kilodelta
from kilodelta.errors import CheckpointError, InputError
from kilodelta.files import identity
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.progress import Event
from tests.support.making import folder, model, write


def by_hand(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> str:
    joined = b""
    for name in sorted(tensors, key=str.encode):
        dtype, shape, raw = tensors[name]
        text = f"{name}\0{dtype}\0{','.join(map(str, shape))}\0".encode()
        joined += hashlib.sha256(text + raw).digest()
    return "sha256:" + hashlib.sha256(joined).hexdigest()


def test_typed_in() -> None:
    assert identity.tensor_digest("w", "U8", (2,), b"\x01\x02") == (
        "sha256:" + hashlib.sha256(b"w\x00U8\x002\x00\x01\x02").hexdigest()
    )
    # printf '' | sha256sum, the root of a model without tensors
    empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert identity.root([]) == empty


def test_the_same_root_for_every_layout(tmp_path: Path) -> None:
    tensors = model()
    expected = by_hand(tensors)
    backwards = dict(reversed(tensors.items()))
    assert kilodelta.digest(write(tmp_path / "a.safetensors", tensors)).root == expected
    assert kilodelta.digest(write(tmp_path / "b.safetensors", backwards)).root == expected
    assert kilodelta.digest(folder(tmp_path / "one", tensors)).root == expected
    assert kilodelta.digest(folder(tmp_path / "three", tensors, shards=3)).root == expected
    for threads in (1, 2, 7):
        found = kilodelta.digest(tmp_path / "three", threads=threads)
        assert found.root == expected


def test_models_in_memory(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = model()
    kinds = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "BF16": "<u2"}
    arrays = {
        n: np.frombuffer(raw, kinds[d]).reshape(s)
        for n, (d, s, raw) in tensors.items()
        if d != "BF16"
    }
    numbers = {n: t for n, t in tensors.items() if t[0] != "BF16"}
    assert kilodelta.digest(arrays).root == by_hand(numbers)
    state = {n: torch.from_numpy(a.copy()) for n, a in arrays.items()}
    for name, (dtype, shape, raw) in tensors.items():
        if dtype == "BF16":
            bits = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16)
            state[name] = bits.reshape(shape).t().contiguous().t()  # strides must not matter
    assert kilodelta.digest(state).root == by_hand(tensors)
    with pytest.raises(InputError, match="a int is not a tensor"):
        kilodelta.digest({"w": 3})
    with pytest.raises(InputError, match="a list is not a model"):
        kilodelta.digest([1])


def test_a_tied_model_has_its_own_files_root(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    tied = transformers.GPT2LMHeadModel(config)
    tied.save_pretrained(tmp_path / "gpt2")
    found = kilodelta.digest(tied)
    assert "lm_head.weight" not in found.tensors
    assert found == kilodelta.digest(tmp_path / "gpt2")


def test_a_transposed_view_is_a_tensor_of_its_own() -> None:
    """Square memory read the other way has the same address, type and shape, and other values."""
    square = np.arange(4, dtype="<f4").reshape(2, 2)
    both = by_hand(
        {
            "a": ("F32", (2, 2), square.tobytes()),
            "b": ("F32", (2, 2), square.T.tobytes()),
        }
    )
    assert kilodelta.digest({"a": square, "b": square.T}).root == both
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(square)
    assert kilodelta.digest({"a": tensor, "b": tensor.t()}).root == both
    assert kilodelta.digest({"a": tensor, "b": tensor[:]}).tensors.keys() == {"a"}


def test_big_endian_arrays_have_the_same_root() -> None:
    values: dict[str, Any] = {
        "f": np.arange(6.0, dtype=np.float32),
        "i": np.arange(3),
        "h": np.array([1, 2], np.float16),
    }
    other = {name: value.astype(value.dtype.newbyteorder(">")) for name, value in values.items()}
    assert other["f"].tobytes() != values["f"].tobytes()
    assert kilodelta.digest(other) == kilodelta.digest(values)


def test_tensors_without_data_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with torch.device("meta"), pytest.raises(InputError, match="meta device"):
        kilodelta.digest({"w": torch.zeros(3)})
    with pytest.raises(InputError, match="sparse"):
        kilodelta.digest({"w": torch.zeros(3).to_sparse()})


def test_a_file_cut_while_it_is_hashed_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"w": ("U8", (9 << 20,), bytes(9 << 20))})

    def cut(event: Event) -> None:
        os.truncate(path, 4096)

    with pytest.raises(CheckpointError, match="ends at byte 4096"):
        kilodelta.digest(path, threads=1, progress=cut)


def test_a_file_changed_while_it_is_hashed_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"w": ("U8", (9,), bytes(9))})

    def change(event: Event) -> None:
        with path.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"x")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        kilodelta.digest(path, threads=1, progress=change)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    def what(path: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint.open(path)
        assert caught.value.fix
        return caught.value.what

    (tmp_path / "empty").mkdir()
    assert "holds no .safetensors file" in what(tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    assert "a folder with pytorch_model.bin, a PyTorch pickle" in what(tmp_path / "empty")
    two = tmp_path / "two"
    two.mkdir()
    write(two / "a.safetensors", model())
    write(two / "b.safetensors", model())
    assert "holds 2 .safetensors files" in what(two)
    assert "No such file" in what(tmp_path / "absent")
    lost = folder(tmp_path / "lost", model(), shards=2)
    (lost / "model-00002-of-00002.safetensors").unlink()
    assert "cannot be opened" in what(lost)
    mixed = folder(tmp_path / "mixed", model(), shards=2)
    write(mixed / "model-00002-of-00002.safetensors", {"other": ("U8", (1,), b"1")})
    assert "disagree about" in what(mixed)
    index = mixed / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        assert "index.json" in what(mixed)


def test_a_hugging_face_cache_folder(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "snapshots").mkdir(parents=True)
    folder(cache / "snapshots" / "abc", model())
    assert kilodelta.digest(cache).root == by_hand(model())
    folder(cache / "snapshots" / "def", model(seed=1))
    with pytest.raises(CheckpointError, match="holds 2 snapshots"):
        kilodelta.digest(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("def\n")
    assert kilodelta.digest(cache).root == by_hand(model(seed=1))
