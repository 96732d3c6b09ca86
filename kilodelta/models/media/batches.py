"""Make batches of images, sounds and pairs, by the processor in the model's own folder.

An encoder-decoder is taught with its target given (teacher forcing): `decoder_input_ids` are the
target's tokens, one place to the right, after the token that starts a text. Where a record has no
target, the model itself writes one, greedily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kilodelta.errors import InputError, one_line, require
from kilodelta.models.inputs.check import DECODER
from kilodelta.models.loaded import Batch, LoadedModel
from kilodelta.models.media.images import read_image
from kilodelta.models.media.processor_fit import check_made, check_stated
from kilodelta.models.media.processor_limits import check_processor_limits
from kilodelta.models.media.records import Record, RecordSource
from kilodelta.models.media.sounds import read_sound
from kilodelta.models.quiet import quiet

_WRITTEN = 64
"""Tokens that a model writes at most where a record has no target."""


def media_batches(source: RecordSource, loaded: LoadedModel, batch_size: int) -> Iterator[Batch]:
    """Yield the rows of a source in their order; rows of one shape, side by side, share a batch.

    Nothing is padded: what a padded position of a sound or a target computes depends on the model.

    Args:
        source: images, sounds or pairs.
        loaded: the model that is to take them; its folder holds the processor.
        batch_size: rows in a batch at most.

    Raises:
        InputError: the folder has no fitting processor, a file cannot be read, or a sound or text
            is longer than the model takes.
        MissingPackageError: Pillow or soundfile is needed.
    """
    make = _maker(source.records[0], loaded, targets=True)
    waiting: list[Batch] = []
    for record in source.records:
        row = {name: tensor for name, tensor in make(record).items() if name in loaded.accepts}
        if waiting and (len(waiting) == batch_size or _shapes(row) != _shapes(waiting[0])):
            yield _joined(waiting)
            waiting = []
        waiting.append(row)
    if waiting:
        yield _joined(waiting)


def source_rows(source: RecordSource, loaded: LoadedModel) -> Iterator[tuple[str, Batch]]:
    """Yield what an encoder reads of each record, one row at a time, after the record's place.

    Args:
        source: images, sounds or pairs; targets are not looked at.
        loaded: the model that is to take them.

    Raises:
        InputError, MissingPackageError: as `media_batches`.
    """
    make = _maker(source.records[0], loaded, targets=False)
    for record in source.records:
        row = make(record)
        yield record.place, {name: row[name] for name in row if name in loaded.accepts}


def _shapes(row: Batch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in row.items()}


def _joined(rows: list[Batch]) -> Batch:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _maker(first: Record, loaded: LoadedModel, *, targets: bool) -> Callable[[Record], Batch]:
    """Choose how a record becomes a row, by what the first one holds; all hold the same."""
    is_decoding = DECODER in loaded.accepts
    if first.target is not None and not is_decoding:
        raise InputError(
            f"{first.place} has a target, and {type(loaded.module).__name__} has no decoder to "
            "write one",
            fix="leave the targets out",
        )
    if first.image is not None and first.text is not None:
        read = _images_and_texts(loaded)
    elif first.image is not None:
        read = _images(loaded)
    elif first.sound is not None:
        read = _sounds(loaded)
    else:
        read = _texts(loaded)
    if not is_decoding or not targets:
        return read

    def with_target(record: Record) -> Batch:
        row = read(record)
        if record.target is not None:
            return {**row, DECODER: _target(record, loaded)}
        return {**row, DECODER: _written(row, loaded, record.place)}

    return with_target


def _images(loaded: LoadedModel) -> Callable[[Record], Batch]:
    processor = _processor("AutoImageProcessor", "images", loaded)

    def read(record: Record) -> Batch:
        assert record.image is not None
        image = read_image(record.image, record.place)
        return _processed(record, lambda: processor(images=[image], return_tensors="pt"))

    return _fitting(read, processor, loaded)


def _images_and_texts(loaded: LoadedModel) -> Callable[[Record], Batch]:
    processor = _processor("AutoProcessor", "images and texts", loaded)

    def read(record: Record) -> Batch:
        assert record.image is not None
        image = read_image(record.image, record.place)
        return _processed(
            record,
            lambda: processor(images=[image], text=[record.text], return_tensors="pt"),
        )

    return _fitting(read, processor, loaded)


def _sounds(loaded: LoadedModel) -> Callable[[Record], Batch]:
    extractor = _processor("AutoFeatureExtractor", "sounds", loaded)
    rate = getattr(extractor, "sampling_rate", None)
    if not isinstance(rate, int) or rate < 1:
        raise InputError(
            f"the processor of {loaded.source} is a {type(extractor).__name__}, which takes no "
            f"sounds (its sampling_rate is {rate!r:.50})",
            fix="give what the model was trained on",
        )
    longest = getattr(extractor, "n_samples", None)  # Whisper cuts behind it without a word

    def read(record: Record) -> Batch:
        assert record.sound is not None
        samples = read_sound(record.sound, rate, record.place)
        if isinstance(longest, int) and len(samples) > longest:
            raise InputError(
                f"{record.place}: {record.sound.name} is {len(samples) / rate:.1f} s long, and the "
                f"model hears {longest / rate:g} s",
                fix="cut it into pieces",
            )
        return _processed(
            record, lambda: extractor(samples, sampling_rate=rate, return_tensors="pt")
        )

    return _fitting(read, extractor, loaded)


def _fitting(
    read: Callable[[Record], Batch], processor: Any, loaded: LoadedModel
) -> Callable[[Record], Batch]:
    """Hold the first row that is read against what the model takes."""
    unchecked = [True]

    def checked(record: Record) -> Batch:
        row = read(record)
        if unchecked:
            check_made(row, processor, loaded)
            unchecked.clear()
        return row

    return checked


def _texts(loaded: LoadedModel) -> Callable[[Record], Batch]:
    def read(record: Record) -> Batch:
        ids = _tokens(record.text or "", record, loaded)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return read


def _tokens(text: str, record: Record, loaded: LoadedModel, *, target: bool = False) -> Tensor:
    """The ids of a text, int64 `(1, tokens)`."""
    if loaded.tokenizer is None:
        raise InputError(
            f"{loaded.source} has no tokenizer, so it cannot read texts",
            fix="copy tokenizer.json and tokenizer_config.json of its base into the folder, or give"
            " token ids in a .npz file",
        )
    encoded = loaded.tokenizer(text_target=text) if target else loaded.tokenizer(text)
    ids = encoded["input_ids"]
    if loaded.max_length is not None and len(ids) > loaded.max_length:
        raise InputError(
            f"{record.place} has a {'target' if target else 'text'} of {len(ids)} tokens, and "
            f"{loaded.source} takes {loaded.max_length}",
            fix="shorten it, or remove the line",
        )
    return torch.tensor([ids])


def _target(record: Record, loaded: LoadedModel) -> Tensor:
    """The target's tokens, one place to the right."""
    ids = _tokens(record.target or "", record, loaded, target=True)
    start = torch.full((1, 1), start_token(loaded))
    if ids[0, 0] == start:  # Whisper's tokenizer begins with it by itself
        return ids[:, :-1] if ids.shape[1] > 1 else ids
    return torch.cat([start, ids[:, :-1]], dim=1)


def start_token(loaded: LoadedModel) -> int:
    """Return the token with which a decoder's text begins.

    Raises:
        InputError: the model does not say.
    """
    module = loaded.module
    owners = (getattr(module, "generation_config", None), getattr(module, "config", None))
    values = (getattr(owner, "decoder_start_token_id", None) for owner in owners)
    found = next((value for value in values if isinstance(value, int)), None)
    if found is None:
        raise InputError(
            f"{loaded.source} does not say with which token its decoder starts",
            fix="write decoder_start_token_id into its config.json",
        )
    return found


def _written(row: Batch, loaded: LoadedModel, place: str) -> Tensor:
    """What the model itself writes, without the last token, which nothing follows."""
    start = torch.full((1, 1), start_token(loaded))
    room = (loaded.max_length or _WRITTEN + 1) - 1
    try:
        with torch.no_grad(), quiet():
            ids: Tensor = loaded.module.generate(  # type: ignore[operator]
                **{name: tensor for name, tensor in row.items() if name in loaded.accepts},
                do_sample=False,
                num_beams=1,
                max_new_tokens=max(1, min(_WRITTEN, room)),
            )
    except Exception as error:  # features of a stranger's processor: NaN, or of any size
        raise InputError(
            f"{place}: {loaded.source} cannot write a target: {one_line(error):.200}",
            fix="give the target as text, or what the model was trained on",
        ) from None
    if not ids.shape[1] or ids[0, 0] != start:  # Whisper's generate leaves its own start out
        ids = torch.cat([start, ids], dim=1)
    return ids[:, :-1] if ids.shape[1] > 1 else ids


def _processor(name: str, kind: str, loaded: LoadedModel) -> Any:
    """Open a processor of transformers from the model's folder."""
    from kilodelta.models.hub import locate

    transformers = require("transformers", extra="hf", why="process images and sounds")
    folder = locate(loaded.source)
    fix = (
        "save the processor that the model was trained with into its folder "
        "(processor.save_pretrained), or give arrays in a .npz file"
    )
    if not Path(folder).is_dir():
        raise InputError(f"{loaded.source} is no folder with a processor for {kind}", fix=fix)
    check_processor_limits(Path(folder))
    try:
        with quiet():
            processor = getattr(transformers, name).from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # strangers' files: anything may be wrong with them
        # What transformers adds is advice about its hub, where this folder is not.
        why = one_line(error).partition(" If you were trying to load")[0]
        raise InputError(
            f"{loaded.source} has no processor for {kind}: {why:.200}", fix=fix
        ) from None
    part = getattr(processor, "image_processor", processor)
    check_stated(Path(folder), part, "sounds" if kind == "sounds" else "images")
    return processor


def _processed(record: Record, work: Callable[[], Mapping[str, Any]]) -> Batch:
    """One row as a processor makes it, floats as float32 and integers as int64."""
    try:
        with quiet():
            made = work()
    except Exception as error:
        raise InputError(
            f"{record.place}: the model's processor cannot take it: {one_line(error):.200}",
            fix="give what the model was trained on, or remove it",
        ) from None
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor.long()
        for name, tensor in made.items()
        if isinstance(tensor, Tensor)
    }
