"""Rows of conversations: token ids, and which of the model's outputs count.

The output at a token is the prediction of the next one. So what counts is not where the assistant's
tokens stand, but the output before each of them. One row is one conversation: none shares a row
with another, so that there is no attention from one to the next, and rows of like length share a
batch, so that little is padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kilodelta.compress.distill.learn.rows import MASK, Rows
from kilodelta.errors import InputError
from kilodelta.models import LoadedModel
from kilodelta.models.chats.tokens import WAY_ON, encode
from kilodelta.models.inputs.check import try_one
from kilodelta.models.inputs.read import length_limit
from kilodelta.models.inputs.sources import ChatSource


@dataclass(frozen=True, kw_only=True)
class ChatRows:
    """Rows, and how many conversations are left out because they were cut before an answer."""

    rows: Rows
    left_out: int


def check_answers(source: ChatSource) -> None:
    """Check that every conversation has something that the assistant wrote.

    Raises:
        InputError: one has not, so nothing in it would count.
    """
    for chat in source.chats:
        if not chat.has_answer:
            roles = ", ".join(dict.fromkeys(one.role for one in chat.messages))
            raise InputError(
                f"{chat.place} holds no answer of the assistant"
                f"{f' (its roles: {roles:.80})' if roles else ''}, so nothing in it would count",
                fix=f"remove the line, or {WAY_ON}",
            )


def chat_rows(
    source: ChatSource, loaded: LoadedModel, *, max_length: int | None, all_tokens: bool
) -> ChatRows:
    """Tokenise conversations.

    Args:
        source: the conversations.
        loaded: the model, with its tokenizer.
        max_length: cut to so many tokens.
        all_tokens: count every token rather than the assistant's.

    Raises:
        InputError: the tokenizer cannot tell the assistant's tokens, no conversation is left, or
            the model cannot compute with them.
    """
    limit = length_limit(loaded, max_length)
    rows, counts = [], []
    for chat in source.chats:
        ids, mask = encode(
            loaded.tokenizer, chat, source=loaded.source, limit=limit, marked=not all_tokens
        )
        next_is_answer = [1] * len(ids) if all_tokens else [*mask[1:], 0]
        if not any(next_is_answer):
            continue
        row = {"input_ids": torch.tensor(ids), MASK: torch.ones(len(ids), dtype=torch.int64)}
        rows.append({name: row[name] for name in loaded.accepts if name in row})
        counts.append(torch.tensor(next_is_answer))
    if not rows:
        raise InputError(
            f"{source.spec}: no conversation reaches an answer within {limit} tokens",
            fix=f"raise --max-length, shorten the prompts, or {WAY_ON}",
        )
    try_one({name: values[None] for name, values in rows[0].items()}, loaded, source.spec)
    fills = {"input_ids": loaded.tokenizer.pad_token_id or 0, MASK: 0}
    # Without a mask among the model's inputs, rows of different lengths cannot share a batch.
    pad = {n: torch.tensor(v) for n, v in fills.items() if n in rows[0]} if MASK in rows[0] else {}
    return ChatRows(
        rows=Rows(tuple(rows), pad, tuple(counts)), left_out=len(source.chats) - len(rows)
    )
