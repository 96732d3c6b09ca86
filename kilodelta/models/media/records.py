"""Find images, sounds and pairs: in a folder, or listed in a `.jsonl` file. Nothing needs torch.

=============================================  ===============================================
 `photos/`                                      every image of the folder and those below it,
                                                or every sound, in the order of their paths
 `{"image": "a.jpg"}`                           an image; the path is taken from the file's folder
 `{"image": "a.jpg", "text": "a cat"}`          an image and a text, for models that take both
 `{"audio": "a.wav"}`                           a sound
 `{"audio": "a.wav", "target": "hello"}`        a sound, and what the decoder is to write
 `{"text": "good day", "target": "bonjour"}`    a source and a target, for encoder-decoders
=============================================  ===============================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.files import plain
from kilodelta.models.inputs.texts import parse_record, read_lines

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
SOUNDS = frozenset({".flac", ".ogg", ".wav"})
"""Suffixes, in lower case."""
KEYS = ("image", "audio", "target")
"""Keys that tell such a record from one of a plain text."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row of inputs.

    Attributes:
        place: what it is called in messages: a path, or `a.jsonl:3`.
        image: a file.
        sound: a file.
        text: what the model reads.
        target: what its decoder writes.
    """

    place: str
    image: Path | None = None
    sound: Path | None = None
    text: str | None = None
    target: str | None = None


@dataclass(frozen=True, kw_only=True)
class RecordSource:
    """Images, sounds or pairs that exist and are not yet read."""

    spec: str
    records: tuple[Record, ...]

    @property
    def rows(self) -> int | None:
        """How many rows there are."""
        return len(self.records)


def is_media(path: Path) -> bool:
    """Tell whether a path is a folder of inputs, or one image or sound.

    Example:
        >>> is_media(Path("photo.JPG")), is_media(Path("texts.txt"))
        (True, False)
    """
    return path.is_dir() or path.suffix.lower() in IMAGES | SOUNDS


def lists_media(path: Path) -> bool:
    """Tell whether the first record of a `.jsonl` file names an image, a sound or a target."""
    for line in read_lines(path):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                return False  # the reader of texts says what is wrong with it
            return isinstance(record, dict) and any(key in record for key in KEYS)
    return False


def read_media(path: Path, limit: int | None = None) -> RecordSource:
    """Find the images or sounds of a folder, or take one file.

    Args:
        path: a folder, or a file with a suffix of `IMAGES` or `SOUNDS`.
        limit: take at most so many.

    Raises:
        InputError: there are none, there are both kinds, or one is a link or a device.
    """
    files = sorted(_walk(path)) if path.is_dir() else [path]
    images = [file for file in files if file.suffix.lower() in IMAGES]
    sounds = [file for file in files if file.suffix.lower() in SOUNDS]
    if not images and not sounds:
        raise InputError(
            f"{path} holds no images and no sounds",
            fix=f"give a folder of {', '.join(sorted(IMAGES | SOUNDS))} files",
        )
    if images and sounds:
        raise InputError(
            f"{path} holds images ({images[0].name}) and sounds ({sounds[0].name})",
            fix="give a folder of one kind, or a .jsonl file that names those to use",
        )
    chosen = tuple(islice((_file(file, str(file)) for file in images or sounds), limit))
    return RecordSource(
        spec=str(path),
        records=tuple(
            Record(place=str(f), image=f) if images else Record(place=str(f), sound=f)
            for f in chosen
        ),
    )


def _walk(folder: Path) -> Iterator[Path]:
    """Every file that is not hidden, in this folder and those below it; links are not entered."""
    for place in folder.iterdir():
        if place.name.startswith("."):
            continue
        if place.is_dir() and not place.is_symlink():
            yield from _walk(place)
        elif not place.is_dir():
            yield place


def read_records(path: Path, *, field: str = "text", limit: int | None = None) -> RecordSource:
    """Read the records of a `.jsonl` file; see the module's docstring.

    Args:
        path: the file; paths in it are taken from its folder.
        field: the key of the text.
        limit: read at most so many.

    Raises:
        InputError: a line is no such record, records differ in what they hold, or a file is
            missing.
    """
    lines = ((n, line) for n, line in enumerate(read_lines(path), 1) if line.strip())
    records = tuple(
        _record(line, path, f"{path}:{number}", field) for number, line in islice(lines, limit)
    )
    if not records:
        raise InputError(f"{path} holds no records", fix="give one object per line")
    for record in records:
        if _held(record) != _held(records[0]):
            raise InputError(
                f"{record.place} holds {_held(record)}, the first record {_held(records[0])}",
                fix="give every record the same keys",
            )
    return RecordSource(spec=str(path), records=records)


def _held(record: Record) -> str:
    names = ("image", "sound", "text", "target")
    return " and ".join(name for name in names if getattr(record, name) is not None)


def _record(line: str, path: Path, place: str, field: str) -> Record:
    record = parse_record(line, place, '{"image": "a.jpg"}')
    image, sound = (_path(record, key, path, place) for key in ("image", "audio"))
    text = _text(record, field, place)
    if image is not None and sound is not None:
        raise InputError(f"{place} names an image and a sound", fix="give one of them")
    if image is None and sound is None and text is None:
        raise InputError(
            f"{place} has no image, audio or {field}; it holds {', '.join(record) or 'nothing'}",
            fix='write lines like {"image": "a.jpg"} or {"text": "...", "target": "..."}',
        )
    target = _text(record, "target", place)
    return Record(place=place, image=image, sound=sound, text=text, target=target)


def _path(record: Mapping[str, Any], key: str, path: Path, place: str) -> Path | None:
    if key not in record:
        return None
    if not isinstance(record[key], str) or not record[key]:
        raise InputError(f"{place}: {key} is no path", fix="write the path of a file as text")
    return _file(path.parent / record[key], place)


def _file(path: Path, place: str) -> Path:
    try:
        regular = plain.is_file(path)
    except (OSError, ValueError):
        regular = False
    if not regular:
        missing = not os.path.lexists(path)  # False for what can be no path as well
        raise InputError(
            f"{place}: {path} {'does not exist' if missing else plain.kind(path)}",
            fix="correct the path" if missing else "put the file itself there",
        )
    return path


def _text(record: Mapping[str, Any], key: str, place: str) -> str | None:
    value = record.get(key)
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise InputError(f"{place}: {key} is no text", fix="write a text that is not empty")
