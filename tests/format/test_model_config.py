"""The manifest's `config`: read and written as it is, bounded, and refused where a loader acts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kilodelta
from kilodelta.errors import FileError
from kilodelta.files import canonical
from kilodelta.files.untrusted import FieldError
from kilodelta.format.manifest import parse
from kilodelta.format.methods import Lora
from kilodelta.format.model_config import MAX_BYTES, apply_config, parse_config
from tests.support.making import delta, model, write

HEAD = {
    "architectures": ["BertForSequenceClassification"],
    "id2label": {"0": "no", "1": "yes", "2": "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    "problem_type": None,
    "rope_parameters": {"rope_theta": 10000.0, "factors": [1.0, 2.5]},
    "vocab_size": 50,
}


def test_it_travels_in_the_file_and_inspect_shows_it(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", model())
    made = delta(base, Lora(rank=1))
    with_head = replace(made, manifest=replace(made.manifest, config=HEAD))
    with_head.save(tmp_path / "task.kd")
    assert kilodelta.load(tmp_path / "task.kd", base=base).manifest.config == HEAD
    assert json.loads(with_head.manifest.text())["config"] == HEAD
    assert kilodelta.inspect(tmp_path / "task.kd").to_json()["config"] == HEAD


def test_a_file_without_it_is_spelled_as_before(tmp_path: Path) -> None:
    made = delta(write(tmp_path / "base.safetensors", model()), Lora(rank=1))
    assert "config" not in json.loads(made.manifest.text())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "config is not an object with at least one key"),
        ([], "config is not an object"),
        ({"auto_map": {"AutoModel": "x.py"}}, "config has a key 'auto_map'"),
        ({"text_config": {"auto_map": 1}}, "config.text_config has a key 'auto_map'"),
        ({"layers": [{"quantization_config": 1}]}, "config.layers has a key 'quantization_config'"),
        ({"torch_dtype": "int8"}, "config has a key 'torch_dtype'"),
        ({"_name_or_path": "/etc"}, "config has a key '_name_or_path'"),
        ({"a.b": 1}, "config has a key 'a.b'"),
        ({"x" * 129: 1}, "which is not allowed there"),
        ({"architectures": []}, "config.architectures is not a list of 1 to 16 names"),
        ({"architectures": "BertModel"}, "config.architectures is not a list"),
        ({"architectures": ["os.system"]}, "config.architectures is not a list"),
        ({"architectures": ["A"] * 17}, "config.architectures is not a list"),
        ({"id2label": {"00": "a"}}, "config.id2label is not an object whose keys"),
        ({"id2label": ["a"]}, "config.id2label is not an object whose keys"),
        ({"id2label": {"0": 1}}, "config.id2label is not a text"),
        ({"label2id": {"a": -1}}, "config.label2id is not an object from labels"),
        ({"label2id": {"a": True}}, "config.label2id is not an object from labels"),
        ({"label2id": {"a" * 1025: 1}}, "a label of more than 1024"),
        ({"a": 1 << 63}, "config.a is not a 64-bit integer"),
        ({"a": "x" * 1025}, "config.a is not a text"),
        ({"a": [[[[1]]]]}, "config.a is nested more than 4 deep"),
        ({"a": {"b": {"c": {"d": {}}}}}, "config.a.b.c.d is nested more than 4 deep"),
        ({f"k{i}": "x" * 1024 for i in range(64)}, f"at most {MAX_BYTES} are allowed"),
    ],
)
def test_what_is_not_inert_or_not_bounded_is_refused(
    config: Any, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(FieldError) as caught:
        parse_config(config)
    assert expected in str(caught.value)
    made = delta(write(tmp_path / "base.safetensors", model()), Lora(rank=1))
    table = json.loads(made.manifest.text()) | {"config": config}
    with pytest.raises(FileError, match="the manifest is wrong: config"):
        parse(canonical.dumps(table))


def test_deep_enough_is_allowed() -> None:
    config = {"a": [[[1]]], "b": {"c": {"d": {}}}, "label2id": {"auto_map": 0, "_x y": 1}}
    assert parse_config(config) == config


def test_each_key_replaces_the_base_s_and_a_stale_count_goes() -> None:
    base = {
        "hidden_size": 8,
        "num_labels": 2,
        "id2label": {"0": "a", "1": "b"},
        "architectures": [],
    }
    assert apply_config(base, HEAD) == {"hidden_size": 8, **HEAD}
    assert apply_config(base, {"vocab_size": 9}) == {**base, "vocab_size": 9}
