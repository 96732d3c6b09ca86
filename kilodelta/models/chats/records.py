"""Read conversations and prompts with completions from `.jsonl`, one per line; no torch needed.

A record holds `messages`, a list of objects with `role` and `content`, or `prompt` and
`completion`, two texts or two such lists. These are the formats that TRL and most chat data sets
use. What else a message holds (tool calls, a name, thoughts) and the record's `tools` are the chat
template's to read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.files import untrusted
from kilodelta.models.inputs.texts import check_encodable, parse_record, read_lines

ASSISTANT = "assistant"
CALLS = "tool_calls"
_EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, ...]}'
_EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values of fields that a table of records fills up where a message has none."""
_FORMATS = f'write {_EXAMPLE} or {{"prompt": "...", "completion": "..."}}'


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: who speaks.
        content: the text; empty where tool calls stand in its place.
        more: the other fields that are not empty, such as `tool_calls`, for the chat template.
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """One record.

    Attributes:
        place: file and line.
        messages: the turns; empty where it is a prompt with a completion.
        prompt: a text.
        completion: the text that follows it.
        tools: what the assistant may call, for the chat template.
    """

    place: str
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def has_answer(self) -> bool:
        """Whether anything in it is the assistant's."""
        if not self.messages:
            return bool(self.completion)
        return any(
            one.role == ASSISTANT and (one.content or CALLS in one.more) for one in self.messages
        )


def is_chat(path: Path, field: str) -> bool:
    """Look at a file's first record: whether it is a conversation and no text under `field`."""
    first = next((line for line in read_lines(path) if line.strip()), "")
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(record, dict)
        and field not in record
        and ("messages" in record or {"prompt", "completion"} <= record.keys())
    )


def read_chats(path: Path, *, limit: int | None = None) -> list[Chat]:
    """Read the conversations of a file in their order; empty lines are skipped.

    Args:
        path: a `.jsonl` file.
        limit: read at most so many.

    Raises:
        InputError: a record is neither of the two formats, or its texts are no texts.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> _ = place.write_text('{"prompt": "1 + 1 =", "completion": " 2"}')
        >>> read_chats(place)[0].completion
        ' 2'
    """
    chats: list[Chat] = []
    for number, line in enumerate(read_lines(path), 1):
        if limit is not None and len(chats) >= limit:
            break
        if line.strip():
            chats.append(_chat(line, f"{path}:{number}"))
    return chats


def _chat(line: str, place: str) -> Chat:
    record = parse_record(line, place, _EXAMPLE)
    tools = read_tools(record, place)
    if "messages" in record:
        messages = read_messages(record["messages"], "messages", place)
        return Chat(place=place, messages=messages, tools=tools)
    if {"prompt", "completion"} <= record.keys():
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            both = (read_messages(part, name, place) for name, part in
                    (("prompt", prompt), ("completion", completion)))  # fmt: skip
            messages = tuple(one for part in both for one in part)
            return Chat(place=place, messages=messages, tools=tools)
        return Chat(
            place=place,
            prompt=_text(prompt, "prompt", place),
            completion=_text(completion, "completion", place),
        )
    what = ", ".join(record) or "nothing"
    raise InputError(f"{place} holds {what}, and the records before are chats", fix=_FORMATS)


def read_messages(value: Any, name: str, place: str) -> tuple[Message, ...]:
    """Read a list of turns out of a record.

    Args:
        value: what stands under `name` in the record.
        name: its key, for errors.
        place: file and line, for errors.

    Raises:
        InputError: it is no list of objects with a role and a text as content.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{place}: {name} is no list of messages", fix=_FORMATS)
    turns = []
    for number, one in enumerate(value, 1):
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise InputError(f"{place}: message {number} has no role", fix=_FORMATS)
        more = {n: v for n, v in one.items() if n not in ("role", "content") and v not in _EMPTY}
        content = one.get("content")
        if content is None and CALLS in more:
            content = ""
        content = _text(content, f"the content of message {number}", place)
        turns.append(Message(role=one["role"], content=content, more=more))
    return tuple(turns)


def read_tools(record: Mapping[str, Any], place: str) -> tuple[Mapping[str, Any], ...]:
    """Read what the assistant of a record may call; nothing where it is null or missing.

    Args:
        record: a line of the file.
        place: file and line, for errors.

    Raises:
        InputError: `tools` is no list of objects.
    """
    tools = record.get("tools")
    if tools in _EMPTY:
        return ()
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise InputError(
            f"{place}: tools is {untrusted.kind(tools)}, not a list of objects",
            fix="write each tool as a JSON schema: an object, not a text that holds one",
        )
    return tuple(tools)


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{place}: {name} is {untrusted.kind(value)}, not text",
            fix="give texts: images and other parts of messages are not read",
        )
    check_encodable(value, place)
    return value
