"""Prompts: plain texts and chats, and what cannot be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kilodelta.errors import InputError
from kilodelta.models import open_model
from kilodelta.models.generation.prompts import read_prompts
from tests.support import pico

TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m['content'] }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] {% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    loaded = open_model(pico.llama(tmp_path_factory.mktemp("chat") / "base"))
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_texts_prompts_and_chats(model: Any, tmp_path: Path) -> None:
    place = write(
        tmp_path / "chat.jsonl",
        '{"text": "rain"}',
        "",
        '{"prompt": "seven birds", "completion": "sing"}',
        '{"messages": [{"role": "user", "content": "rain"},'
        ' {"role": "assistant", "content": "came down"}]}',
        '{"messages": [{"role": "user", "content": "rain"}]}',
        '{"prompt": [{"role": "user", "content": "rain"}],'
        ' "completion": [{"role": "assistant", "content": "came down"}]}',
    )
    prompts = read_prompts(place, model)
    tokens = [model.tokenizer.convert_ids_to_tokens(list(prompt.ids)) for prompt in prompts]
    assert [t for t in tokens[0] if not t.startswith("[")] == ["rain"]
    assert [t for t in tokens[1] if not t.startswith("[")] == ["seven", "birds"]
    # The answer is what the model is to write; the template alone writes special tokens.
    assert tokens[2] == ["[CLS]", "rain", "[SEP]", "[CLS]"]
    assert tokens[4] == tokens[3] == tokens[2]
    assert prompts[1].place.endswith("chat.jsonl:3")


def test_lines_of_text(model: Any, tmp_path: Path) -> None:
    place = write(tmp_path / "a.txt", "rain", "seven birds")
    assert len(read_prompts(place, model)) == 2
    assert len(read_prompts(place, model, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "is a list, not an object"),
        ("{", "is not JSON"),
        ('{"question": "rain"}', "no text in a field 'text', 'prompt' or 'messages'"),
        ('{"messages": []}', "messages is no list of messages"),
        ('{"messages": "rain"}', "messages is no list of messages"),
        ('{"prompt": []}', "prompt is no list of messages"),
        ('{"messages": [{"content": "rain"}]}', "message 1 has no role"),
        ('{"messages": [{"role": "user"}]}', "content of message 1 is null, not text"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
            "content of message 1 is a list, not text",
        ),
        ('{"messages": [{"role": "assistant", "content": "rain"}]}', "begins with the assistant"),
        ('{"text": "' + "rain " * 40 + '"}', "is a prompt of 4. tokens"),
    ],
)
def test_what_is_no_prompt(line: str, reason: str, model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        read_prompts(write(tmp_path / "chat.jsonl", line), model)
    assert "chat.jsonl:1" in caught.value.what


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    loaded = open_model(pico.llama(tmp_path / "base"))
    line = '{"messages": [{"role": "user", "content": "rain"}]}'
    with pytest.raises(InputError, match="has no chat template"):
        read_prompts(write(tmp_path / "chat.jsonl", line), loaded)


def test_a_template_that_refuses_is_a_sentence(model: Any, tmp_path: Path) -> None:
    loaded = open_model(pico.llama(tmp_path / "base"))
    loaded.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    line = '{"messages": [{"role": "user", "content": "rain"}]}'
    with pytest.raises(InputError, match="roles must alternate"):
        read_prompts(write(tmp_path / "chat.jsonl", line), loaded)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="has no tokenizer"):
        read_prompts(write(tmp_path / "a.txt", "rain"), open_model(base))


def test_no_prompts(model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(write(tmp_path / "a.txt", "", ""), model)
