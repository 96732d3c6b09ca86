"""Turn a conversation into token ids, and tell which of them the assistant wrote.

The tokenizer's own chat template says how turns are framed. Where it marks the assistant's words
(`{% generation %}`), transformers tells their tokens. Most templates do not; then the tokens of a
turn are those that it adds: the conversation up to it, with the prompt for an answer, must be the
beginning of the conversation with it. A template for which that does not hold (one that drops
earlier thoughts, or dates its header) is refused, because no one could say which tokens count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kilodelta.errors import InputError, one_line
from kilodelta.models.chats.records import ASSISTANT, Chat, Message

WAY_ON = "count every token with --loss-on all"


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
            fix="give token ids in a .npz file, or a folder with a tokenizer",
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
    same = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
        min(len(before), len(whole)),
    )
    return whole, [int(place >= same) for place in range(len(whole))]


def _conversation(
    tokenizer: Any, chat: Chat, source: str, *, marked: bool
) -> tuple[list[int], list[int]]:
    def ids_of(count: int, *, prompt: bool) -> list[int]:
        turns = chat.messages[:count]
        return render(tokenizer, turns, place=chat.place, source=source, prompt=prompt)

    ids = ids_of(len(chat.messages), prompt=False)
    if not marked:
        return ids, [0] * len(ids)
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        marked_ids = tokenizer.apply_chat_template(
            _turns(chat.messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(marked_ids["input_ids"]), list(marked_ids["assistant_masks"])
    mask = [0] * len(ids)
    for place, turn in enumerate(chat.messages):
        if turn.role != ASSISTANT:
            continue
        begin = ids_of(place, prompt=True) if place else []
        end = ids_of(place + 1, prompt=False)
        if ids[: len(begin)] != begin or ids[: len(end)] != end:
            raise InputError(
                f"{chat.place}: the chat template of {source} does not tell which tokens are the"
                " assistant's: a turn changes what stands before it",
                fix=f"mark them in the template with {{% generation %}}, or {WAY_ON}",
            )
        mask[len(begin) : len(end)] = [1] * (len(end) - len(begin))
    return ids, mask


def render(
    tokenizer: Any, messages: Sequence[Message], *, place: str, source: str, prompt: bool
) -> list[int]:
    """Tokenise turns as the tokenizer's chat template frames them.

    Args:
        tokenizer: of transformers.
        messages: the turns.
        place: file and line, for errors.
        source: what the model is called, for errors.
        prompt: whether the frame of an answer follows.

    Raises:
        InputError: there is no chat template, or it refuses the turns.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            f"{place} is a conversation, and the tokenizer of {source} has no chat template",
            fix="give texts, as text or as prompt and completion, or a folder with a chat template",
        )
    try:
        ids = tokenizer.apply_chat_template(
            _turns(messages), tokenize=True, add_generation_prompt=prompt, return_dict=False
        )
    except Exception as error:  # a template is a program, and raises what it likes
        raise InputError(
            f"{place}: the chat template refuses the conversation: {one_line(error)}",
            fix="give turns in the order and with the roles that the template takes",
        ) from None
    return list(ids)


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": one.role, "content": one.content} for one in messages]
