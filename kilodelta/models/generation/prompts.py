"""Read prompts for a generating model: plain texts, or chats in the model's own template.

==============================================  ===============================================
 a line of a `.txt` file                         the prompt itself
 `{"text": "..."}` (or the field named)          the prompt itself
 `{"prompt": "...", "completion": "..."}`        the prompt
 `{"messages": [{"role": ..., "content": ...}]}` all turns before the last one of the assistant,
                                                 in the tokenizer's chat template
==============================================  ===============================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.models.loaded import LoadedModel
from kilodelta.models.texts import read_lines


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is to continue.

    Attributes:
        place: where it was read, such as `chat.jsonl:3`.
        ids: its tokens, at least one.
    """

    place: str
    ids: tuple[int, ...]


def read_prompts(
    path: str | Path, loaded: LoadedModel, *, field: str = "text", limit: int | None = None
) -> list[Prompt]:
    """Read prompts in their order; empty lines are skipped.

    Args:
        path: a `.jsonl` file, or any other file of plain lines, UTF-8.
        loaded: a model with a tokenizer.
        field: the key of a plain text in a record.
        limit: read at most so many.

    Raises:
        InputError: the file cannot be read, a record holds no prompt, a chat cannot be written in
            the model's template, or a prompt leaves no room for a further token.

    Example:
        >>> read_prompts("chat.jsonl", open_model("smollm2/"))[0].ids[:3]  # doctest: +SKIP
        (1, 9690, 198)
    """
    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.source} has no tokenizer, so it cannot read prompts",
            fix="save the tokenizer into the model's folder: tokenizer.save_pretrained(folder)",
        )
    prompts: list[Prompt] = []
    for place, line in _records(Path(path)):
        if limit is not None and len(prompts) >= limit:
            break
        prompts.append(Prompt(place=place, ids=_ids(line, field, loaded, place)))
    if not prompts:
        raise InputError(f"{path} holds no prompts", fix="give a file with one prompt per line")
    return prompts


def _records(path: Path) -> Iterator[tuple[str, str | dict[str, Any]]]:
    for number, line in enumerate(read_lines(path), 1):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield place, line.strip()
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{place} is not JSON: {error}", fix="write one object per line"
            ) from None
        if not isinstance(record, dict):
            raise InputError(
                f"{place} is a {type(record).__name__}, not an object",
                fix='write lines like {"messages": [{"role": "user", "content": "..."}]}',
            )
        yield place, record


def _ids(
    record: str | dict[str, Any], field: str, loaded: LoadedModel, place: str
) -> tuple[int, ...]:
    if isinstance(record, dict) and "messages" in record:
        ids = _chat_ids(_turns(record["messages"], place), loaded, place)
    else:
        ids = _text_ids(_text(record, field, place), loaded, place)
    if not ids:
        raise InputError(f"{place} holds an empty prompt", fix="give it text, or remove the line")
    if loaded.max_length is not None and len(ids) >= loaded.max_length:
        raise InputError(
            f"{place} is a prompt of {len(ids)} tokens, and {loaded.source} takes "
            f"{loaded.max_length} with what it writes",
            fix="shorten the prompt, or remove the line",
        )
    return ids


def _text(record: str | Mapping[str, Any], field: str, place: str) -> str:
    if isinstance(record, str):
        return record
    text = record.get(field, record.get("prompt"))
    if not isinstance(text, str):
        raise InputError(
            f"{place} has no text in a field {field!r}, 'prompt' or 'messages'; it holds "
            f"{', '.join(record) or 'nothing'}",
            fix="name the field of the text by --field",
        )
    return text


def _text_ids(text: str, loaded: LoadedModel, place: str) -> tuple[int, ...]:
    try:
        return tuple(loaded.tokenizer(text)["input_ids"])
    except (ValueError, TypeError, UnicodeError) as error:
        raise InputError(
            f"{place}: the tokenizer of {loaded.source} cannot take it: {error}",
            fix="write whole characters, as json.dumps(..., ensure_ascii=False) does",
        ) from None


def _turns(messages: Any, place: str) -> list[dict[str, str]]:
    """The turns to answer: those before the last turn of the assistant, where there is one."""
    is_list = isinstance(messages, list) and messages
    if not is_list or not all(_is_turn(turn) for turn in messages):
        raise InputError(
            f"{place}: messages is no list of turns with a role and a text as content",
            fix='write turns like {"role": "user", "content": "..."}',
        )
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    asked = turns[: answers[-1]] if answers else turns
    if not asked:
        raise InputError(
            f"{place}: the chat begins with the assistant, so there is nothing to answer",
            fix="put a turn of the user first",
        )
    return asked


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(
        isinstance(turn.get(key), str) for key in ("role", "content")
    )


def _chat_ids(
    turns: Sequence[Mapping[str, str]], loaded: LoadedModel, place: str
) -> tuple[int, ...]:
    if not getattr(loaded.tokenizer, "chat_template", None):
        raise InputError(
            f"{place} is a chat, and the tokenizer of {loaded.source} has no chat template",
            fix='give plain prompts, {"text": "..."}, or a tokenizer with a chat template',
        )
    try:
        text = loaded.tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program of the folder's, which may raise anything
        raise InputError(
            f"{place}: the chat template of {loaded.source} refuses it: {error}",
            fix="order the turns as the model was trained on: user and assistant in turn",
        ) from None
    # The template writes the special tokens itself.
    return tuple(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
