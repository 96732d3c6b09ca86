"""What is given in a model's or a .kd file's place is named, with the command that helps."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kilodelta
from kilodelta.errors import CheckpointError, FileError
from kilodelta.kinds import kind_of_file, looks_like_hub_id


@pytest.mark.parametrize(
    ("name", "data", "said", "fix"),
    [
        ("texts.txt", b"how do I reset\n", "it is a text file", "--inputs"),
        ("t.jsonl", '{"text": "wie geht das, ä"}\n'.encode() * 99, "it is a text file", "--inputs"),
        ("config.json", b'{"model_type": "bert"}', "it is a JSON file", "folder"),
        ("model.gguf", b"GGUF\x03\x00\x00\x00" + bytes(99), "a GGUF file", "converted from"),
        ("model.bin", b"\x80\x02}q\x00." + bytes(9), "a PyTorch pickle", "save_pretrained"),
        ("model.pth", b"PK\x03\x04" + bytes(99), "a PyTorch pickle", "save_pretrained"),
        ("renamed", pickle.dumps({"w": 1}), "a PyTorch pickle", "save_pretrained"),
        ("model.onnx", b"\x08\x0a\x12\x07pytorch" + bytes(99), "an ONNX file", "exported from"),
        ("in.npz", b"PK\x03\x04" + bytes(99), "an .npz file of arrays", "--inputs"),
        ("a.npy", b"\x93NUMPY\x01\x00" + bytes(99), "a .npy file", "--inputs"),
        ("model.engine", b"ptrt" + bytes(99), "a TensorRT engine", "kilodelta verify"),
        ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "a Keras or HDF5 file", "save_pretrained"),
    ],
)
@pytest.mark.parametrize("read", [kilodelta.inspect, kilodelta.digest])
def test_a_file_of_another_kind_is_named(
    tmp_path: Path, name: str, data: bytes, said: str, fix: str, read: Any
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises((FileError, CheckpointError), match=said) as caught:
        read(tmp_path / name)
    assert fix in caught.value.fix
    assert "header claims" not in str(caught.value)


def test_real_files_of_numpy_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    np.save(tmp_path / "x.npy", np.zeros(3))
    for name in ("x.npz", "x.npy"):
        with pytest.raises(FileError, match=r"it is an? \.np"):
            kilodelta.inspect(tmp_path / name)


@pytest.mark.parametrize("data", [b"", b"\0" * 99, bytes(range(256)), b"\xff\xff\xff\xff" * 99])
def test_what_is_not_known_is_told_by_its_numbers(tmp_path: Path, data: bytes) -> None:
    assert kind_of_file(tmp_path / "x", data) is None
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FileError):
        kilodelta.inspect(tmp_path / "x")


def test_a_text_may_be_cut_within_a_character() -> None:
    text = "ä" * 400
    for size in (510, 511, 512, 513):
        assert kind_of_file(Path("x"), text.encode()[:size]) is not None


@pytest.mark.parametrize(
    ("files", "said", "fix"),
    [
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors.x": b""},
            "PEFT adapter",
            "import",
        ),
        ({"bundle.json": b"{}"}, "a device folder", "kilodelta status"),
        ({"manifest.json": b"{}"}, "folder of an export", "kilodelta verify"),
        ({"q4.gguf": b"GGUF"}, r"a folder with q4\.gguf, a GGUF file", "converted from"),
        ({"pytorch_model.bin": b""}, r"a folder with pytorch_model\.bin", "save_pretrained"),
        ({"notes.md": b""}, "holds no .safetensors file", "save_pretrained"),
    ],
)
def test_a_folder_of_another_kind_is_named(
    tmp_path: Path, files: dict[str, bytes], said: str, fix: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=said) as caught:
        kilodelta.digest(tmp_path)
    assert fix in caught.value.fix


def test_a_hub_id_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="neither a file nor a folder") as caught:
        kilodelta.digest("sentence-transformers/all-MiniLM-L6-v2")
    assert "hf download sentence-transformers/all-MiniLM-L6-v2" in caught.value.fix
    (tmp_path / "models").mkdir()
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        kilodelta.digest("models/absent")  # the folder is here, so it is a path


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("org/name", True), ("org/na.me-2", True), ("/org/name", False), ("a/b/c", False),
     ("../name", False), ("name", False), ("org/", False)],
)  # fmt: skip
def test_hub_ids(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, is_one: bool) -> None:
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id(text) is is_one


def test_json_of_the_command_line_says_it_too(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from kilodelta.cli import main

    (tmp_path / "texts.txt").write_text("how\n" * 10)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "texts.txt"), "--json"])
    assert result.exit_code == 3
    assert "it is a text file" in json.loads(result.stdout)["error"]
