"""Read prompts for a generating model: plain texts, or chats in the model's own template.

==============================================  ===============================================
 a line of a `.txt` file                         the prompt itself
 `{"text": "..."}` (or the field named)          the prompt itself
 `{"prompt": "...", "completion": "..."}`        the prompt, a text or a list of turns
 `{"messages": [{"role": ..., "content": ...}]}` all turns before the last one of the assistant,
                                                 in the tokenizer's chat template
==============================================  ===============================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.models.chats.records import ASSISTANT, Message, read_messages, read_tools
from kilodelta.models.chats.tokens import render
from kilodelta.models.inputs.texts import parse_record, read_lines
from kilodelta.models.loaded import Batch, LoadedModel

_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}]}'


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is to continue.

    Attributes:
        place: where it was read, such as `chat.jsonl:3`.
        ids: its tokens, at least one.
        source: what an encoder reads, one row; empty of a decoder alone.
    """

    place: str
    ids: tuple[int, ...]
    source: Batch = field(default_factory=dict)


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
        if path.suffix.lower() != ".jsonl":
            yield place, line.strip()
        else:
            yield place, parse_record(line, place, _EXAMPLE)


def _ids(
    record: str | dict[str, Any], field: str, loaded: LoadedModel, place: str
) -> tuple[int, ...]:
    asked = _turns(record, field, place) if isinstance(record, dict) else ()
    if asked:
        tools = read_tools(record, place) if isinstance(record, dict) else ()
        source, tokenizer = loaded.source, loaded.tokenizer
        ids = tuple(render(tokenizer, asked, place=place, source=source, prompt=True, tools=tools))
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


def _turns(record: Mapping[str, Any], field: str, place: str) -> tuple[Message, ...]:
    """Return the turns to answer: those before the assistant's last one; none of a plain text."""
    if "messages" not in record:
        prompt = record.get("prompt")
        is_chat = field not in record and isinstance(prompt, list)
        return read_messages(prompt, "prompt", place) if is_chat else ()
    messages = read_messages(record["messages"], "messages", place)
    answers = [n for n, one in enumerate(messages) if one.role == ASSISTANT]
    asked = messages[: answers[-1]] if answers else messages
    if not asked:
        raise InputError(
            f"{place}: the chat begins with the assistant, so there is nothing to answer",
            fix="put a turn of the user first",
        )
    return asked
