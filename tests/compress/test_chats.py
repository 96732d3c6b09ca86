"""Conversations as inputs: which tokens count, what is refused, and that only these are learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from click.testing import CliRunner

from kilodelta.cli import main
from kilodelta.compress import Options, compress
from kilodelta.compress.distill.learn.chat_rows import chat_rows, check_answers
from kilodelta.compress.distill.learn.rows import Rows
from kilodelta.errors import InputError
from kilodelta.models import open_model, open_source, read_inputs
from kilodelta.models.chats.records import Chat, Message, read_chats
from kilodelta.models.chats.tokens import encode
from kilodelta.models.generation.prompts import read_prompts
from kilodelta.models.inputs.sources import ChatSource
from kilodelta.models.loaded import LoadedModel
from tests.support import pico

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} roof {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m['role'] }} {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} roof{% endgeneration %} "
    "{% else %}{{ m['content'] }} roof {% endif %}{% endfor %}"
)
DATED = "{{ 'rain' if messages | length > 2 else 'roof' }} " + TEMPLATE
"""A header that changes with every turn."""
SILENT = DATED.replace("m['content']", "m['content'] | length")
"""The same, without the words."""
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }} "
    "{% if m['role'] == 'assistant' and loop.last %}old mill {% endif %}"
    "{{ m['content'] }} [SEP] {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
"""Frames the last answer otherwise than those before, as Qwen3's thoughts are."""
TOOLED = (
    "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}"
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['name'] }} {% endfor %} roof {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico.llama(tmp_path_factory.mktemp("chats") / "base")


def model(folder: Path, template: str | None = TEMPLATE) -> LoadedModel:
    loaded = open_model(folder)
    loaded.tokenizer.chat_template = template
    return loaded


def conversation(*turns: tuple[str, str]) -> Chat:
    return Chat(place="a:1", messages=tuple(Message(role=r, content=c) for r, c in turns))


def words(loaded: LoadedModel, ids: list[int]) -> list[str]:
    return [str(word) for word in loaded.tokenizer.convert_ids_to_tokens(ids)]


def answered(loaded: LoadedModel, chat: Chat) -> list[str]:
    """The words that the assistant wrote, as the masks have it."""
    ids, mask = encode(loaded.tokenizer, chat, source="m", limit=None)
    return [w for w, one in zip(words(loaded, ids), mask, strict=True) if one]


TWO_TURNS = conversation(
    ("user", "who would sing"), ("assistant", "seven birds"),
    ("user", "all night"), ("assistant", "rain"),
)  # fmt: skip


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_the_assistant_s_words_and_their_ends_count(folder: Path, template: str) -> None:
    found = answered(model(folder, template), TWO_TURNS)
    assert found == ["seven", "birds", "roof", "rain", "roof"]


def test_words_are_found_where_a_turn_changes_what_stands_before_it(folder: Path) -> None:
    assert answered(model(folder, DATED), TWO_TURNS) == ["seven", "birds", "rain", "roof"]
    forgetful = answered(model(folder, FORGETFUL), TWO_TURNS)
    assert forgetful == ["seven", "birds", "[SEP]", "old", "mill", "rain", "[SEP]"]


def test_what_frames_an_assistant_s_first_turn_is_not_its_words(folder: Path) -> None:
    chat = conversation(("assistant", "seven birds"), ("user", "all"), ("assistant", "rain"))
    for template in (TEMPLATE, MARKED):
        found = answered(model(folder, "garden " + template), chat)
        assert found == ["seven", "birds", "roof", "rain", "roof"]


def test_tools_and_their_calls_are_the_template_s_to_read(folder: Path, tmp_path: Path) -> None:
    asked = {"role": "user", "content": "who", "tool_calls": None, "name": ""}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "mill"}]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [asked, call], "tools": [{"name": "birds"}]}))
    [chat] = read_chats(path)
    assert chat.has_answer
    assert chat.messages[0].more == {}
    loaded = model(folder, TOOLED)
    ids, mask = encode(loaded.tokenizer, chat, source="m", limit=None)
    assert words(loaded, ids)[:3] == ["birds", "[UNK]", "who"]
    assert answered(loaded, chat) == ["mill", "roof"]
    assert read_prompts(path, loaded)[0].ids == tuple(ids[: mask.index(1)])
    path.write_text(json.dumps({"messages": [asked, call], "tools": '[{"name": "birds"}]'}))
    with pytest.raises(InputError, match=r"a\.jsonl:1: tools is text, not a list of objects"):
        read_chats(path)


def test_a_template_that_tells_nothing_is_refused_with_a_way_on(folder: Path) -> None:
    loaded = model(folder, SILENT)
    with pytest.raises(InputError, match="does not tell which tokens are the assistant's") as why:
        encode(loaded.tokenizer, TWO_TURNS, source="m", limit=None)
    assert "--loss-on all" in why.value.fix
    ids, _ = encode(loaded.tokenizer, TWO_TURNS, source="m", limit=None, marked=False)
    assert len(ids) > 10
    with pytest.raises(InputError, match="has no chat template"):
        encode(model(folder, None).tokenizer, TWO_TURNS, source="m", limit=None)
    broken = model(folder, "{{ raise_exception('only users') }}")
    with pytest.raises(InputError, match="refuses the conversation: only users"):
        encode(broken.tokenizer, TWO_TURNS, source="m", limit=None)
    with pytest.raises(InputError, match="m has no tokenizer"):
        encode(None, TWO_TURNS, source="m", limit=None)


def test_a_completion_counts_to_its_end(folder: Path) -> None:
    chat = Chat(place="a:1", prompt="who would sing", completion=" seven birds")
    assert answered(model(folder), chat) == ["seven", "birds", "[SEP]"]
    ids, mask = encode(model(folder).tokenizer, chat, source="m", limit=5)
    assert (len(ids), mask) == (5, [0, 0, 0, 0, 1])


def test_the_output_before_each_answering_token_counts(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "who", "completion": " seven birds"}) + "\n")
    source = open_source(path)
    assert isinstance(source, ChatSource)
    loaded = model(folder)
    rows = chat_rows(source, loaded, max_length=None, all_tokens=False).rows
    assert words(loaded, rows.rows[0]["input_ids"].tolist()) == [
        "[CLS]", "who", "seven", "birds", "[SEP]",
    ]  # fmt: skip
    assert rows.counts[0].tolist() == [0, 1, 1, 1, 0]
    whole = chat_rows(source, loaded, max_length=None, all_tokens=True).rows
    assert whole.counts[0].tolist() == [1, 1, 1, 1, 1]
    assert whole.digest() != rows.digest()


def test_counts_are_padded_and_follow_their_rows() -> None:
    ids = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    rows = Rows(
        tuple({"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids),
        {"input_ids": torch.tensor(0), "attention_mask": torch.tensor(0)},
        (torch.tensor([0, 1, 0]), torch.tensor([1])),
    )
    mask = rows.mask([1, 0])
    assert mask is not None
    assert mask.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert rows.subset([1]).counts[0].tolist() == [1]


WRONG: dict[str, tuple[Any, str]] = {
    "no role": ({"messages": [{"content": "x"}]}, "message 1 has no role"),
    "no list": ({"messages": "x"}, "messages is no list"),
    "empty": ({"messages": []}, "messages is no list"),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "is a list, not text",
    ),
    "tools": ({"messages": [{"role": "assistant", "content": None}]}, "is null, not text"),
    "number": ({"prompt": "x", "completion": 3}, "completion is a number, not text"),
    "half": ({"prompt": "x", "completion": "\ud800"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("name", WRONG)
def test_records_that_are_no_chats_are_refused_by_line(name: str, tmp_path: Path) -> None:
    record, why = WRONG[name]
    good = {"prompt": "a", "completion": "b"}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (good, record)) + "\n")
    with pytest.raises(InputError, match=rf"a\.jsonl:2.*{why}"):
        read_chats(path)


def test_a_mixture_and_a_chat_without_answers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"text": "c"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2 holds text, and the records before are"):
        open_source(path)
    path.write_text('{"messages": [{"role": "user", "content": "c"}]}\n' * 20)
    source = open_source(path)
    assert isinstance(source, ChatSource)
    with pytest.raises(InputError, match=r"a\.jsonl:1 holds no answer .*roles: user\)") as why:
        check_answers(source)
    assert "--loss-on all" in why.value.fix
    # Before any model: neither folder exists.
    answer = CliRunner().invoke(
        main, ["compress", str(tmp_path), str(tmp_path), "-o", str(tmp_path / "x.kd"), "--inputs",
               str(path)])  # fmt: skip
    assert "holds no answer" in answer.stderr


def test_prompts_of_messages_are_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turn = {"role": "user", "content": "a"}
    answer = {"role": "assistant", "content": "b"}
    path.write_text(json.dumps({"prompt": [turn], "completion": [answer]}) + "\n")
    [chat] = read_chats(path)
    assert [one.role for one in chat.messages] == ["user", "assistant"]
    path.write_text(json.dumps({"text": "x", "messages": [turn]}) + "\n")
    assert not isinstance(open_source(path), ChatSource)  # the field that was asked for comes first


def test_only_answers_are_learnt_from_and_measured(folder: Path, tmp_path: Path) -> None:
    tuned = pico.tuned(folder, tmp_path / "tuned", size=0.3)
    some = pico.WORDS.split()
    records = [
        {"prompt": f"{some[i % 20]} {some[3 * i % 20]}", "completion": f" {some[7 * i % 20]}"}
        for i in range(40)
    ]
    records[5] = {"prompt": " ".join(some[:12]), "completion": " rain"}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    options = Options(steps=4, batch=8, budget=4000, max_length=8)
    answers = compress(folder, tuned, tmp_path / "a.kd", inputs=path, options=options)
    assert any("1 conversation was cut before an answer" in w for w in answers.warnings)
    every = Options(steps=4, batch=8, budget=4000, max_length=8, loss_on="all")
    whole = compress(folder, tuned, tmp_path / "b.kd", inputs=path, options=every)
    assert answers.before is not None
    assert whole.before is not None
    assert answers.before.divergence != whole.before.divergence
    assert answers.held_out == 4
    for batch in read_inputs(path, open_model(folder)):  # other commands take them whole
        assert batch["input_ids"].shape == batch["attention_mask"].shape
