"""Turn a conversation into token ids, and tell which of them the assistant wrote.

The tokenizer's own chat template says how turns are framed. Where it marks the assistant's words
(`{% generation %}`), transformers tells their tokens. Most templates do not; then the tokens of a
turn are those that it adds: the conversation up to it, with the prompt for an answer, is the
beginning of the conversation with it. Where it is not (a template drops earlier thoughts, counts
turns in its header, or ends a conversation with one more token), or nothing comes before the turn,
the turn's tokens are those that change with its words. A template that shows neither is refused,
because no one could say which tokens count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from kilodelta.errors import InputError, one_line
from kilodelta.models.chats.records import ASSISTANT, CALLS, Chat, Message

WAY_ON = "count every token with --loss-on all"
JOINED = 2
"""Tokens of the frame that may melt into the first or last ones of other words."""


def encode(
    tokenizer: Any, chat: Chat, *, source: str, limit: int | None, marked: bool = True
) -> tuple[list[int], list[int]]:
    """Tokenise one record.

    Args:
        tokenizer: of transformers.
        chat: the record.
        source: what the model is called, for errors.
        limit: cut to so many tokens; None does not cut.
        marked: whether the assistant's tokens have to be told from the others.

    Returns:
        Token ids, and for each 1 where the assistant wrote it, else 0.

    Raises:
        InputError: there is no tokenizer or no chat template, or the template does not tell the
            assistant's tokens.
    """
    if tokenizer is None:
        raise InputError(
            f"{source} has no tokenizer, so it cannot read {chat.place}",
            fix="copy tokenizer.json and tokenizer_config.json of its base into the folder, or give"
            " token ids in a .npz file",
        )
    if not chat.messages:
        ids, mask = _completion(tokenizer, chat)
    else:
        ids, mask = _conversation(tokenizer, chat, source, marked=marked)
    return ids[:limit], mask[:limit]


def _completion(tokenizer: Any, chat: Chat) -> tuple[list[int], list[int]]:
    """Join a prompt and its completion, which ends as the model is to end it."""
    before = list(tokenizer(chat.prompt)["input_ids"])
    whole = list(tokenizer(chat.prompt + chat.completion)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and (not whole or whole[-1] != end):
        whole.append(end)
    # Tokens at the border may join both texts, and a frame's end stands behind the prompt alone.
    same = _shared(before, whole)
    return whole, [int(place >= same) for place in range(len(whole))]


def _conversation(
    tokenizer: Any, chat: Chat, source: str, *, marked: bool
) -> tuple[list[int], list[int]]:
    def ids_of(turns: Sequence[Message], *, prompt: bool = False) -> list[int]:
        return render(
            tokenizer, turns, place=chat.place, source=source, prompt=prompt, tools=chat.tools
        )

    ids = ids_of(chat.messages)
    if not marked:
        return ids, [0] * len(ids)
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        marked_ids = tokenizer.apply_chat_template(
            _turns(chat.messages),
            tools=list(chat.tools) or None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(marked_ids["input_ids"]), list(marked_ids["assistant_masks"])
    mask = [0] * len(ids)
    for place, turn in enumerate(chat.messages):
        if turn.role != ASSISTANT:
            continue
        before = ids_of(chat.messages[:place], prompt=True) if place else []
        after = ids_of(chat.messages[: place + 1])
        begin = len(before) if place and ids[: len(before)] == before else None
        end = len(after) if ids[: len(after)] == after else None
        if begin is None or end is None:
            found = _by_words(ids, chat.messages, place, ids_of, _ends(tokenizer))
            if found is None:
                raise InputError(
                    f"{chat.place}: the chat template of {source} does not tell which tokens are"
                    " the assistant's: a turn changes what stands before it",
                    fix=f"mark them in the template with {{% generation %}}, or {WAY_ON}",
                )
            begin = found[0] if begin is None else begin
            end = found[1] if end is None else end
        mask[begin:end] = [1] * (end - begin)
    return ids, mask


def _by_words(
    ids: list[int],
    turns: Sequence[Message],
    place: int,
    ids_of: Callable[[Sequence[Message]], list[int]],
    ends: Set[int],
) -> tuple[int, int] | None:
    """Find a turn's words by other words in their place, and the end of the turn behind them."""
    if CALLS in turns[place].more:  # they are words as well
        return None
    one, other = (
        ids_of([*turns[:place], replace(turns[place], content=word), *turns[place + 1 :]])
        for word in ("a", "b")
    )
    before = _shared(one, other)
    after = _shared(one[:before:-1], other[:before:-1])
    begin = _shared(ids, one[:before])
    end = max(begin, len(ids) - _shared(ids[::-1], one[::-1][:after]))
    moved = max(before - begin, after - (len(ids) - end))
    if one == other or moved > JOINED:
        return None
    return begin, end + (end < len(ids) and ids[end] in ends)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _ends(tokenizer: Any) -> Set[int]:
    """Return the tokens that may end a turn: those that no text is split into."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *added}


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    place: str,
    source: str,
    prompt: bool,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Tokenise turns as the tokenizer's chat template frames them.

    Args:
        tokenizer: of transformers.
        messages: the turns.
        place: file and line, for errors.
        source: what the model is called, for errors.
        prompt: whether the frame of an answer follows.
        tools: what the assistant may call, as the template takes them.

    Raises:
        InputError: there is no chat template, or it refuses the turns.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{place} is a conversation, and the tokenizer of {source} has no chat template",
            fix="copy chat_template.jinja of its base into the folder, or give texts, as text or as"
            " prompt and completion",
        )
    try:
        ids = tokenizer.apply_chat_template(
            _turns(messages),
            tools=list(tools) or None,
            tokenize=True,
            add_generation_prompt=prompt,
            return_dict=False,
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise InputError(
            f"{place}: the chat template refuses the conversation: {one_line(error)}",
            fix="give turns in the order and with the roles that the template takes",
        ) from None
    return list(ids)


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{"role": one.role, "content": one.content, **one.more} for one in messages]
