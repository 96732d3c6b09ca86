"""Reading texts from `.jsonl` and `.txt` files, one per line."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kilodelta.errors import InputError
from kilodelta.files import plain, untrusted


def read_texts(path: str | Path, *, field: str = "text", limit: int | None = None) -> list[str]:
    """Read the texts of a file in their order; empty lines are skipped.

    Args:
        path: a `.jsonl` file of objects, or any other file of plain lines, UTF-8.
        field: the key of the text in an object.
        limit: read at most so many texts; None reads all.

    Raises:
        InputError: the file is missing, empty or not UTF-8, or a line is no object with a text.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()) / "a.jsonl"
        >>> _ = place.write_text('{"text": "one"}\\n\\n{"text": "two"}\\n')
        >>> read_texts(place)
        ['one', 'two']
    """
    place = Path(path)
    texts = list(islice(_texts(place, field), limit))
    if not texts:
        raise InputError(f"{place} holds no text", fix="give a file with one text per line")
    return texts


def _texts(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            is_record = path.suffix.lower() == ".jsonl"
            yield _text(line, field, f"{path}:{number}") if is_record else line.strip()


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file one by one, so that a large one never lies in memory whole.

    Args:
        path: a UTF-8 file; a byte order mark is dropped.

    Raises:
        InputError: it is missing, no regular file, or not UTF-8.
    """
    passed = 0
    try:
        with io.BufferedReader(plain.open_reader(path, follow=True)) as file:  # type: ignore[type-var]
            for line in file:
                text = line if passed else line.removeprefix(codecs.BOM_UTF8)
                yield text.decode("utf-8").removesuffix("\n")
                passed += len(line)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at {passed + error.start}",
            fix="convert it, for example with iconv -t utf-8",
        ) from None
    except plain.NotPlainError:
        raise InputError(f"{path} is not a regular file", fix="give a file of texts") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", fix="check the path") from None


def _text(line: str, field: str, place: str) -> str:
    record = parse_record(line, place, f'{{"{field}": "..."}}')
    if field not in record:
        raise InputError(
            f"{place} has no field {field!r}; it holds {', '.join(record) or 'nothing'}",
            fix="give every line that field, or name another one by --field",
        )
    text = record[field]
    if not isinstance(text, str):
        raise InputError(
            f"{place}: {field!r:.80} is {untrusted.kind(text)}, not text",
            fix="write texts there, or name the field of the text by --field",
        )
    check_encodable(text, place)
    return text


def parse_record(line: str, place: str, example: str) -> dict[str, Any]:
    """Parse one line of a `.jsonl` file.

    Args:
        line: the line.
        place: file and line, for errors.
        example: such a line, for errors.

    Raises:
        InputError: it is no JSON object.
    """
    try:
        record = json.loads(line)
    except RecursionError:
        raise InputError(f"{place} is nested too deeply", fix=f"write {example}") from None
    except ValueError as error:
        raise InputError(f"{place} is not JSON: {error}", fix="write one object per line") from None
    if not isinstance(record, dict):
        raise InputError(
            f"{place} is {untrusted.kind(record)}, not an object", fix=f"write lines like {example}"
        )
    return record


def check_encodable(text: str, place: str) -> None:
    """Refuse half of a surrogate pair, which JSON can spell and no tokenizer takes.

    Raises:
        InputError: the text holds one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} holds half of a surrogate pair, {error.object[error.start]!a}",
            fix="write whole characters, as json.dumps(..., ensure_ascii=False) does",
        ) from None
