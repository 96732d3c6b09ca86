"""Turn inputs into batches that a model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kilodelta.errors import InputError, KiloDeltaError, is_failure, one_line
from kilodelta.files.npz import read_npz
from kilodelta.models.chats.records import Chat
from kilodelta.models.chats.tokens import encode
from kilodelta.models.inputs.check import check, check_headers, try_one
from kilodelta.models.inputs.sources import (
    CalledSource,
    ChatSource,
    Source,
    TextSource,
    open_source,
)
from kilodelta.models.inputs.sources import check_spec as check_spec
from kilodelta.models.inputs.texts import read_texts as read_texts
from kilodelta.models.loaded import Batch as Batch
from kilodelta.models.loaded import LoadedModel
from kilodelta.models.media.batches import media_batches
from kilodelta.models.media.records import RecordSource


def read_inputs(
    spec: str | Path | Source,
    loaded: LoadedModel,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    field: str = "text",
    max_length: int | None = None,
) -> list[Batch]:
    """Read inputs into batches, in their order, and see that the model computes with a row of them.

    Args:
        spec: a `.jsonl` or `.txt` file of texts, one per line, or a `.jsonl` file of conversations
            (`kilodelta.models.chats.records`); a `.npz` file with one array per input; a folder of
            images or sounds, or a `.jsonl` file of their paths or of pairs
            (`kilodelta.models.media.records`); `package.module:function`, which returns batches
            (mappings from names to tensors or arrays, or bare ones for the model's main input); or
            what `kilodelta.models.inputs.sources.open_source` made of one of these.
        loaded: the model that is to take them.
        limit: read at most so many rows; a source that is open has its own limit.
        batch_size: rows in a batch; a function's batches stay as they are.
        field: the key of the text in a `.jsonl` record.
        max_length: cut texts to so many tokens; by default the model's own limit.

    Returns:
        Batches: floats as float32, integers as int64, booleans as they are.

    Raises:
        InputError: the inputs cannot be read, or the model cannot compute with them.
    """
    source = open_source(spec, field=field, limit=limit) if isinstance(spec, (str, Path)) else spec
    batches = list(_batches(source, loaded, batch_size, max_length))
    if not batches:
        raise InputError(f"{source.spec} holds no inputs", fix="give at least one")
    for batch in [batches[0]] if isinstance(source, TextSource) else _extremes(batches):
        try_one(batch, loaded, source.spec)
    return batches


def _extremes(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first batch, and the smallest and the largest row of other shapes.

    Sounds, and images that a processor does not resize, differ in size: a clip that is shorter than
    a kernel would else stop the work long after it has begun.
    """

    def size(batch: Batch) -> int:
        return sum(tensor[0].numel() for tensor in batch.values())

    others = [batch for batch in batches if _shape(batch) != _shape(batches[0])]
    if not others:
        return [batches[0]]
    least, most = min(others, key=size), max(others, key=size)
    return [batches[0], least] if least is most else [batches[0], least, most]


def _shape(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape[1:]) for name, tensor in batch.items()}


def tokenize(loaded: LoadedModel, texts: Sequence[str], *, max_length: int | None = None) -> Batch:
    """Make one batch of texts, int64 (texts, tokens), padded at the right to the longest.

    Args:
        loaded: a model with a tokenizer.
        texts: the texts.
        max_length: cut to so many tokens; by default the model's own limit.

    Raises:
        InputError: the model has no tokenizer, or one that cannot pad; or a length beyond the
            model's limit is asked for.
    """
    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.source} has no tokenizer, so it cannot read texts",
            fix="copy tokenizer.json and tokenizer_config.json of its base into the folder, or give"
            " token ids in a .npz file",
        )
    limit = length_limit(loaded, max_length)
    try:
        encoded = loaded.tokenizer(
            list(texts),
            padding=True,
            truncation=limit is not None,
            max_length=limit,
            return_tensors="pt",
        )
    except BaseException as error:  # no pad token, odd characters, or a tokenizer.json that lies
        if not is_failure(error):
            raise
        raise InputError(
            f"the tokenizer of {loaded.source} cannot make a batch: {one_line(error)}",
            fix="give token ids in a .npz file, or a tokenizer with a pad token",
        ) from None
    return {name: encoded[name] for name in loaded.accepts if name in encoded}


def length_limit(loaded: LoadedModel, wanted: int | None) -> int | None:
    """Return how many tokens a text may have, None where nothing limits it.

    Raises:
        InputError: more are asked for than the model takes.
    """
    if wanted is None or loaded.max_length is None:
        return loaded.max_length if wanted is None else wanted
    if wanted > loaded.max_length:
        raise InputError(
            f"texts of {wanted} tokens are longer than {loaded.source} takes",
            fix=f"cut them to {loaded.max_length} tokens or fewer",
        )
    return wanted


def _batches(
    source: Source, loaded: LoadedModel, batch_size: int, max_length: int | None
) -> Iterator[Batch]:
    if isinstance(source, TextSource):
        for start in range(0, len(source.texts), batch_size):
            part = source.texts[start : start + batch_size]
            yield tokenize(loaded, part, max_length=max_length)
    elif isinstance(source, ChatSource):
        for start in range(0, len(source.chats), batch_size):
            chats = source.chats[start : start + batch_size]
            yield _padded(_encoded(chats, loaded, max_length), loaded)
    elif isinstance(source, RecordSource):
        for batch in media_batches(source, loaded, batch_size):
            yield check(batch, loaded, source.spec)
    elif isinstance(source, CalledSource):
        yield from _limited(_called(source, loaded), source.limit)
    else:
        check_headers(source.headers, loaded, source.spec)
        arrays = check(read_npz(source.spec, rows=source.rows), loaded, source.spec)
        for start in range(0, _rows(arrays), batch_size):
            yield _cut(arrays, start, start + batch_size)


def _encoded(chats: Sequence[Chat], loaded: LoadedModel, max_length: int | None) -> list[list[int]]:
    limit = length_limit(loaded, max_length)
    return [
        encode(loaded.tokenizer, chat, source=loaded.source, limit=limit, marked=False)[0]
        for chat in chats
    ]


def _padded(encoded: Sequence[Sequence[int]], loaded: LoadedModel) -> Batch:
    """Make a batch of token ids, padded at the right, with its mask where the model takes one."""
    longest = max(map(len, encoded))
    fill = loaded.tokenizer.pad_token_id or 0
    ids = torch.tensor([[*row, *[fill] * (longest - len(row))] for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded])
    named = {"input_ids": ids, "attention_mask": mask}
    return {name: named[name] for name in loaded.accepts if name in named}


def _rows(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def _limited(batches: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    """Yield batches until `limit` rows, the last one cut."""
    left = limit
    for batch in batches:
        if left is None:
            yield batch
            continue
        yield _cut(batch, 0, left)
        left -= min(left, _rows(batch))
        if left == 0:
            return


def _called(source: CalledSource, loaded: LoadedModel) -> Iterator[Batch]:
    result = _call(source, source.function)
    if isinstance(result, (str, bytes, Mapping)) or not isinstance(result, Iterable):
        raise InputError(
            f"{source.spec} returned a {type(result).__name__}",
            fix="return or yield batches: mappings from input names to tensors or arrays",
        )
    items = iter(result)
    end = object()
    while (item := _call(source, lambda: next(items, end))) is not end:
        named = item if isinstance(item, Mapping) else {loaded.required[0]: item}
        yield check(named, loaded, source.spec)


def _call(source: CalledSource, step: Any) -> Any:
    """Run a piece of the user's code; what it raises becomes a sentence, its cause chained."""
    try:
        return step()
    except KiloDeltaError:
        raise
    except Exception as error:
        place, _, name = source.spec.partition(":")
        raise InputError(
            f"{source.spec} fails with {type(error).__name__}: {one_line(error)}",
            fix=f'see where by python -c "import {place}; list({place}.{name}())"',
        ) from error
