"""Inputs as they lie on disk or in a user's code, read and judged before any model is opened.

Opening a model takes seconds to minutes; a wrong path, field or array is known at once. Nothing
here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from kilodelta.errors import InputError
from kilodelta.files.npz import ArrayHeader, names_and_shapes, read_headers
from kilodelta.models.chats.records import Chat, is_chat, read_chats
from kilodelta.models.entry import find_entry, is_entry
from kilodelta.models.inputs.texts import read_texts
from kilodelta.models.media.records import (
    RecordSource,
    is_media,
    lists_media,
    read_media,
    read_records,
)

KINDS = ".jsonl, .txt, .npz, a folder of images or sounds, or package.module:function"
TEXTS, ARRAYS = (".jsonl", ".txt"), ".npz"


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Texts of a file, read whole."""

    spec: str
    texts: tuple[str, ...]

    @property
    def rows(self) -> int | None:
        """How many rows there are."""
        return len(self.texts)


@dataclass(frozen=True, kw_only=True)
class ChatSource:
    """Conversations of a file, read whole."""

    spec: str
    chats: tuple[Chat, ...]

    @property
    def rows(self) -> int | None:
        """Count the rows."""
        return len(self.chats)


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """An `.npz` file whose arrays are known and not yet read."""

    spec: str
    headers: Mapping[str, ArrayHeader]
    limit: int | None

    @property
    def rows(self) -> int | None:
        """How many rows are to be read."""
        count = next(iter(self.headers.values())).shape[0]
        return count if self.limit is None else min(self.limit, count)


@dataclass(frozen=True, kw_only=True)
class CalledSource:
    """A function of the user's, imported and not yet called."""

    spec: str
    function: Callable[[], Any]
    limit: int | None

    @property
    def rows(self) -> int | None:
        """None: only calling the function tells."""
        return None


Source: TypeAlias = TextSource | ChatSource | ArraySource | CalledSource | RecordSource


def check_spec(spec: str | Path) -> None:
    """Check that inputs exist and are of a known kind, without reading them.

    Raises:
        InputError: they are not.
    """
    path = Path(spec)
    if not str(spec):  # a path of nothing would be the working directory
        raise InputError("the inputs are named by an empty text", fix=f"give {KINDS}")
    if path.is_dir():
        return
    if path.suffix.lower() in (*TEXTS, ARRAYS) or is_media(path):
        if not path.is_file():
            raise InputError(f"{spec} is no file", fix="check the path")
    elif not is_entry(str(spec)):
        raise InputError(f"{spec} is no kind of input", fix=f"give {KINDS}")


def open_source(spec: str | Path, *, field: str = "text", limit: int | None = None) -> Source:
    """Read texts, the headers of arrays, or import a function; refuse what cannot be inputs.

    Args:
        spec: a `.jsonl`, `.txt` or `.npz` file, a folder of images or sounds, one of either, or
            `package.module:function`.
        field: the key of the text in a `.jsonl` record.
        limit: use at most so many rows; None uses all.

    Raises:
        InputError: the inputs cannot be read, or their rows do not agree.
    """
    check_spec(spec)
    text = str(spec)
    suffix = Path(spec).suffix.lower()
    if is_media(Path(spec)):
        return read_media(Path(spec), limit)
    if suffix == ".jsonl" and lists_media(Path(spec)):
        return read_records(Path(spec), field=field, limit=limit)
    if suffix == ".jsonl" and is_chat(Path(spec), field):
        return ChatSource(spec=text, chats=tuple(read_chats(Path(spec), limit=limit)))
    if suffix in TEXTS:
        return TextSource(spec=text, texts=tuple(read_texts(spec, field=field, limit=limit)))
    if suffix == ARRAYS:
        headers = read_headers(spec)
        _check_rows(text, headers)
        return ArraySource(spec=text, headers=headers, limit=limit)
    return CalledSource(spec=text, function=find_entry(text), limit=limit)


def _check_rows(spec: str, headers: Mapping[str, ArrayHeader]) -> None:
    counts = {header.shape[:1] for header in headers.values()}
    if counts & {(), (0,)}:
        raise InputError(
            f"{spec} holds no rows: {names_and_shapes(headers)}",
            fix="give arrays of shape (rows, ...) with at least one row",
        )
    if len(counts) > 1:
        raise InputError(
            f"{spec}: rows differ: {names_and_shapes(headers)}", fix="give as many of each"
        )
