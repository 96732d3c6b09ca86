"""Turn inputs into batches that a model takes, and refuse by name those that it does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilodelta.errors import InputError, KiloDeltaError, is_failure, one_line
from kilodelta.files.npz import ArrayHeader, read_npz
from kilodelta.models.chats.records import Chat
from kilodelta.models.chats.tokens import encode
from kilodelta.models.loaded import Batch as Batch
from kilodelta.models.loaded import LoadedModel, outputs
from kilodelta.models.media.batches import media_batches
from kilodelta.models.media.records import RecordSource
from kilodelta.models.quiet import quiet
from kilodelta.models.sources import CalledSource, ChatSource, Source, TextSource, open_source
from kilodelta.models.sources import check_spec as check_spec
from kilodelta.models.texts import read_texts as read_texts

TOKENS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
"""Inputs of text models: integers of shape (batch, tokens)."""
IMAGES = "pixel_values"
_PLAIN = {"f": np.float32, "i": np.int64, "u": np.int64}
"""By the kind of numpy's dtype: what a model computes with."""


def read_inputs(
    spec: str | Path | Source,
    loaded: LoadedModel,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    field: str = "text",
    max_length: int | None = None,
) -> list[Batch]:
    """Read inputs into batches, in their order, and see that the model computes with one row.

    Args:
        spec: a `.jsonl` or `.txt` file of texts, one per line, or a `.jsonl` file of conversations
            (`kilodelta.models.chats.records`); a `.npz` file with one array per input; a folder of
            images or sounds, or a `.jsonl` file of their paths or of pairs
            (`kilodelta.models.media.records`); `package.module:function`, which returns batches
            (mappings from names to tensors or arrays, or bare ones for the model's main input); or
            what `kilodelta.models.sources.open_source` made of one of these.
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
    try_one(batches[0], loaded, source.spec)
    return batches


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
            fix="give token ids in a .npz file, or a folder with a tokenizer",
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


def check(named: Mapping[str, Any], loaded: LoadedModel, origin: str) -> Batch:
    """Check a batch's names, types and shapes against a model, and convert it.

    Args:
        named: tensors or arrays by input name.
        loaded: the model that is to take them.
        origin: where they come from, for the error.

    Returns:
        The batch: floats as float32, integers as int64, booleans as they are.

    Raises:
        InputError: naming the input, what it is and what it should be.
    """
    _check_names(named, loaded, origin)
    values = {name: _array(name, value, origin) for name, value in named.items()}
    for name, value in values.items():
        _check_kind(name, _kind(value), tuple(value.shape), loaded, origin)
    batch = {name: _tensor(value) for name, value in values.items()}
    counts = {name: len(tensor) for name, tensor in batch.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"{origin}: rows differ: {listed}", fix="give as many of each")
    for name, tensor in batch.items():
        _check_values(name, tensor, loaded, origin)
    return batch


def check_headers(headers: Mapping[str, ArrayHeader], loaded: LoadedModel, origin: str) -> None:
    """Check the arrays of an `.npz` file against a model before they are read.

    Raises:
        InputError: naming the array, what it is and what it should be.
    """
    _check_names(headers, loaded, origin)
    for name, header in headers.items():
        _check_kind(name, header.dtype.name, header.shape, loaded, origin)


def try_one(batch: Batch, loaded: LoadedModel, origin: str) -> None:
    """Compute with the first row of a batch, so that inputs are blamed before long work begins.

    A model may need more than one row; then the whole batch is tried.

    Raises:
        InputError: naming the inputs with types and shapes, and the model's own complaint.
    """
    first = _cut(batch, 0, 1)
    with torch.no_grad(), quiet():
        problem = _failure(first, loaded)
        if problem is not None and _rows(batch) > 1 and _failure(batch, loaded) is None:
            return
    if problem is not None:
        given = ", ".join(
            f"{name} {str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
            for name, t in first.items()
        )
        raise InputError(
            f"{origin}: {loaded.source} cannot compute with {given}: {one_line(problem)}",
            fix="give what the model was trained on: floats as float32 (pixels scaled and"
            " normalised), token ids as integers, within the sizes that it takes",
        )


def _failure(batch: Batch, loaded: LoadedModel) -> Exception | None:
    try:
        outputs(loaded, batch)
    except KiloDeltaError:
        raise
    except Exception as error:  # a module's own code may raise anything
        return error
    return None


def _check_names(named: Mapping[str, Any], loaded: LoadedModel, origin: str) -> None:
    if not named:
        raise InputError(f"{origin} holds no arrays", fix=f"give {', '.join(loaded.required)}")
    absent = [name for name in loaded.required if name not in named]
    unknown = [name for name in named if name not in loaded.accepts]
    if absent or unknown:
        wrong = [f"lacks {name}" for name in absent] + [f"holds {name}" for name in unknown]
        raise InputError(
            f"{origin} {' and '.join(wrong)}",
            fix=f"the model takes {', '.join(loaded.accepts)} "
            f"and needs {', '.join(loaded.required)}",
        )


def _array(name: str, value: Any, origin: str) -> Any:
    """Take a tensor or numpy array of floats, integers or booleans, in its own dtype."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise _no_array(name, value.dtype, origin)
        return value.detach()
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise _no_array(name, array.dtype, origin)
    return array


def _no_array(name: str, dtype: Any, origin: str) -> InputError:
    return InputError(
        f"{origin}: {name} is an array of {dtype}", fix="give floats, integers or booleans"
    )


def _kind(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _tensor(value: Any) -> Tensor:
    """Floats as float32, integers as int64, booleans as they are."""
    if not isinstance(value, Tensor):
        return torch.from_numpy(np.array(value, dtype=_PLAIN.get(value.dtype.kind, value.dtype)))
    if value.is_floating_point():
        return value.float()
    return value if value.dtype == torch.bool else value.long()


def _check_kind(
    name: str, dtype: str, shape: tuple[int, ...], loaded: LoadedModel, origin: str
) -> None:
    """Check one input's dtype and shape, of which a model's kind says what they should be."""
    wanted = _wanted(name, dtype, shape, loaded)
    if not shape or shape[0] == 0:
        wanted = wanted or "(batch, ...) with at least one row"
    if wanted is not None:
        raise InputError(f"{origin}: {name} has shape {shape} of {dtype}", fix=f"give {wanted}")


def _wanted(name: str, dtype: str, shape: tuple[int, ...], loaded: LoadedModel) -> str | None:
    """Say what the input should be where it is not that; None where it is right or not known."""
    is_float = "float" in dtype
    if loaded.kind == "text" and name in TOKENS:
        return None if len(shape) == 2 and not is_float else "integers of shape (batch, tokens)"
    if loaded.kind == "image" and name == IMAGES:
        channels = getattr(getattr(loaded.module, "config", None), "num_channels", 3)
        if len(shape) == 4 and is_float and shape[1] == channels:
            return None
        wanted = f"floats of shape (batch, {channels}, height, width)"
        raw = ", scaled and normalised as the model's image processor does"
        return wanted if is_float else wanted + raw
    return None


def _check_values(name: str, tensor: Tensor, loaded: LoadedModel, origin: str) -> None:
    if tensor.is_floating_point() and bool(tensor.isnan().any()):
        row = int(tensor.reshape(len(tensor), -1).isnan().any(1).nonzero()[0])
        raise InputError(f"{origin}: {name} holds NaN in row {row}", fix="remove or repair the row")
    size = _vocabulary(loaded) if loaded.kind == "text" and name == "input_ids" else None
    if size is not None and tensor.numel():
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= size:
            raise InputError(
                f"{origin}: {name} holds {low if low < 0 else high},"
                f" which is no token of {loaded.source}",
                fix=f"give ids from 0 to {size - 1}: those of this model's own tokenizer",
            )


def _vocabulary(loaded: LoadedModel) -> int | None:
    """Return how many rows the model's table of words has; None where it does not say."""
    try:
        table = loaded.module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    count = getattr(table, "num_embeddings", None)
    return count if isinstance(count, int) else None
