"""Reading inputs for a model: texts, arrays, or batches that a function yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilodelta.errors import InputError
from kilodelta.models.entry import call_entry, is_entry
from kilodelta.models.loaded import Batch as Batch
from kilodelta.models.loaded import LoadedModel
from kilodelta.models.texts import read_texts as read_texts

_KINDS = ".jsonl, .txt, .npz or package.module:function"


def read_inputs(
    spec: str | Path,
    loaded: LoadedModel,
    *,
    limit: int | None = None,
    batch_size: int = 32,
    field: str = "text",
    max_length: int | None = None,
) -> list[Batch]:
    """Read inputs into batches, in their order.

    Args:
        spec: a `.jsonl` or `.txt` file of texts, one a line; a `.npz` file with one array per
            input; or `package.module:function`, which returns batches (mappings from names to
            tensors or arrays, or bare ones for the model's main input).
        limit: read at most so many rows.
        batch_size: rows in a batch; a function's batches stay as they are.
        field: the key of the text in a `.jsonl` record.
        max_length: cut texts to so many tokens; by default the model's own limit.

    Raises:
        InputError: the inputs cannot be read, or do not fit the model.
    """
    check_spec(spec)
    batches = list(_batches(str(spec), loaded, limit, batch_size, field, max_length))
    if not batches:
        raise InputError(f"{spec} holds no inputs", fix="give at least one")
    return batches


def check_spec(spec: str | Path) -> None:
    """See that inputs are there and of a known kind, before any long work.

    Raises:
        InputError: they are not.
    """
    path = Path(spec)
    if path.suffix in (".jsonl", ".txt", ".npz"):
        if not path.is_file():
            raise InputError(f"{spec} is no file", fix="check the path")
    elif not is_entry(str(spec)):
        raise InputError(f"{spec} is no kind of input", fix=f"give {_KINDS}")


def tokenize(loaded: LoadedModel, texts: Sequence[str], *, max_length: int | None = None) -> Batch:
    """One batch of texts, padded at the right to the longest.

    Raises:
        InputError: the model has no tokenizer.
    """
    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.source} has no tokenizer, so it cannot read texts",
            fix="give token ids in a .npz file, or a folder with a tokenizer",
        )
    limit = max_length or loaded.max_length
    encoded = loaded.tokenizer(
        list(texts),
        padding=True,
        truncation=limit is not None,
        max_length=limit,
        return_tensors="pt",
    )
    return {name: encoded[name] for name in loaded.accepts if name in encoded}


def _batches(
    spec: str,
    loaded: LoadedModel,
    limit: int | None,
    batch_size: int,
    field: str,
    max_length: int | None,
) -> Iterator[Batch]:
    suffix = Path(spec).suffix
    if suffix in (".jsonl", ".txt"):
        for texts in _parts(read_texts(spec, field=field, limit=limit), batch_size):
            yield tokenize(loaded, texts, max_length=max_length)
    elif suffix == ".npz":
        arrays = check(_read_npz(Path(spec)), loaded, spec)
        rows = _rows(arrays) if limit is None else min(limit, _rows(arrays))
        for start in range(0, rows, batch_size):
            yield _cut(arrays, start, min(start + batch_size, rows))
    else:
        yield from _limited(_called(spec, loaded), limit)


def _parts(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def _rows(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def _limited(batches: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    """Batches until `limit` rows, the last one cut."""
    left = limit
    for batch in batches:
        if left is None:
            yield batch
            continue
        yield _cut(batch, 0, left)
        left -= min(left, _rows(batch))
        if left == 0:
            return


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise InputError(
            f"{path} is not an .npz file of plain arrays: {error}",
            fix="write it with numpy.savez(path, name=array)",
        ) from None


def _called(spec: str, loaded: LoadedModel) -> Iterator[Batch]:
    result = call_entry(spec)
    if isinstance(result, (str, bytes, Mapping)) or not isinstance(result, Iterable):
        raise InputError(
            f"{spec} returned a {type(result).__name__}",
            fix="return or yield batches: mappings from input names to tensors or arrays",
        )
    for item in result:
        named = item if isinstance(item, Mapping) else {loaded.required[0]: item}
        yield check(named, loaded, spec)


def check(named: Mapping[str, Any], loaded: LoadedModel, origin: str) -> Batch:
    """A batch as the model takes it: known names, known shapes, int64 or float32.

    Raises:
        InputError: naming the input, what it is and what it should be.
    """
    _check_names(named, loaded, origin)
    batch = {name: _tensor(name, value, origin) for name, value in named.items()}
    for name, tensor in batch.items():
        _check_shape(name, tensor, loaded, origin)
    if len({len(tensor) for tensor in batch.values()}) > 1:
        counts = ", ".join(f"{name} {len(tensor)}" for name, tensor in batch.items())
        raise InputError(f"{origin}: rows differ: {counts}", fix="give as many of each")
    return batch


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


def _tensor(name: str, value: Any, origin: str) -> Tensor:
    """Floats as float32, integers as int64, booleans as they are."""
    tensor = value if isinstance(value, Tensor) else _from_array(name, value, origin)
    if tensor.is_floating_point():
        return tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _from_array(name: str, value: Any, origin: str) -> Tensor:
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise InputError(
            f"{origin}: {name} is an array of {array.dtype}",
            fix="give floats, integers or booleans",
        )
    return torch.from_numpy(np.array(array, dtype=_PLAIN.get(array.dtype.kind, array.dtype)))


_PLAIN = {"f": np.float32, "i": np.int64, "u": np.int64}


def _check_shape(name: str, tensor: Tensor, loaded: LoadedModel, origin: str) -> None:
    wanted = _wanted(name, tensor, loaded)
    if tensor.ndim == 0 or len(tensor) == 0:
        wanted = wanted or "(batch, ...) with at least one row"
    if wanted is not None:
        raise InputError(
            f"{origin}: {name} has shape {tuple(tensor.shape)} of {tensor.dtype}",
            fix=f"give {wanted}",
        )


def _wanted(name: str, tensor: Tensor, loaded: LoadedModel) -> str | None:
    """What the input should be where it is not that; None where it is right or not known."""
    if loaded.kind == "text" and name in ("input_ids", "attention_mask", "token_type_ids"):
        right = tensor.ndim == 2 and not tensor.is_floating_point()
        return None if right else "integers of shape (batch, tokens)"
    if loaded.kind == "image" and name == "pixel_values":
        channels = getattr(getattr(loaded.module, "config", None), "num_channels", 3)
        right = tensor.ndim == 4 and tensor.is_floating_point() and tensor.shape[1] == channels
        return None if right else f"floats of shape (batch, {channels}, height, width)"
    return None
