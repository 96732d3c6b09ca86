"""Find a model or a `.kd` file: a path, or `hf:org/name` for a repository of the Hugging Face hub.

Only the prefix sends a name to the network. A mistyped path therefore never becomes a download.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from kilodelta.errors import CheckpointError, InputError, one_line, require
from kilodelta.models.quiet import quiet

PREFIX = "hf:"
_REPOSITORY = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
# Weights as safetensors, configuration and tokenizer: no pickles, and no Python to run.
_FIX_DELTA = "write hf:org/name, or hf:org/name/FILE.kd where it holds several"
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def is_hub_name(source: str) -> bool:
    """Return whether a text names a repository of the hub.

    Example:
        >>> is_hub_name("hf:org/name"), is_hub_name("org/name")
        (True, False)
    """
    return source.startswith(PREFIX)


def name_of(source: str | os.PathLike[str]) -> str:
    """Return what a model on the hub is called, such as `org/name`; nothing for a path.

    The folder that it is fetched to is named after a commit, which tells people nothing.

    Example:
        >>> name_of("hf:org/name"), name_of("models/base")
        ('org/name', '')
    """
    text = os.fspath(source)
    return text.removeprefix(PREFIX) if is_hub_name(text) else ""


def locate(source: str | Path) -> Path:
    """Return where a model's files lie: the path itself, or what a hub name was fetched to.

    Args:
        source: a path, or `hf:org/name`. Whether a path exists is for whoever opens it to say.

    Raises:
        InputError: `hf:` is followed by something that is no repository's name.
        CheckpointError: the repository cannot be fetched.
        MissingPackageError: huggingface_hub is needed.

    Example:
        >>> str(locate("models/base"))
        'models/base'
    """
    text = str(source)
    return fetch(text) if is_hub_name(text) else Path(source)


def locate_delta(source: str | os.PathLike[str]) -> Path:
    """Return where a `.kd` file lies: the path itself, or what a hub name was fetched to.

    Args:
        source: a path, `hf:org/name` for a repository with one `.kd` file, or
            `hf:org/name/FILE.kd`.

    Raises:
        InputError: `hf:` names no file, or the repository holds none or several.
        CheckpointError: the repository cannot be fetched.
        MissingPackageError: huggingface_hub is needed.

    Example:
        >>> str(locate_delta("task.kd"))
        'task.kd'
    """
    text = os.fspath(source)
    if not is_hub_name(text):
        return Path(text)
    owner, _, rest = text.removeprefix(PREFIX).partition("/")
    name, _, file = rest.partition("/")
    if file and not all(re.fullmatch(r"\w[\w.-]{0,95}", part) for part in file.split("/")):
        raise InputError(f"{source!r:.120} names no file of a repository", fix=_FIX_DELTA)
    wanted = file or "*.kd"
    folder = _snapshot(f"{PREFIX}{owner}/{name}", (wanted, f"{wanted}.sig"))  # a release's proof
    files = [folder / file] if file else sorted(folder.rglob("*.kd"))
    if len(files) != 1 or not files[0].is_file():
        listed = ", ".join(str(path.relative_to(folder)) for path in files[:5] if path.is_file())
        raise InputError(
            f"{source} holds {f'several .kd files: {listed}' if listed else 'no such .kd file'}",
            fix=_FIX_DELTA,
        )
    return files[0]


def locate_either(source: str | os.PathLike[str]) -> Path:
    """Return where a model or a `.kd` file lies, for what compares two of either.

    Args:
        source: a path, `hf:org/name/FILE.kd`, or `hf:org/name`: the model of the repository, or
            where it has no weights its one `.kd` file.

    Raises:
        InputError, CheckpointError, MissingPackageError: as `locate` and `locate_delta`.
    """
    text = os.fspath(source)
    if not is_hub_name(text) or text.endswith(".kd"):
        return locate_delta(text)
    folder = fetch(text)
    return folder if any(folder.glob("*.safetensors")) else locate_delta(text)


def fetch(source: str) -> Path:
    """Download `hf:org/name`, or find it in the cache, and return the snapshot's folder.

    Raises:
        InputError, CheckpointError, MissingPackageError: as `locate`.
    """
    return _snapshot(source, _FILES)


def _snapshot(source: str, files: Sequence[str]) -> Path:
    name = source.removeprefix(PREFIX)
    if _REPOSITORY.fullmatch(name) is None:
        raise InputError(
            f"{source!r:.120} names no repository of the Hugging Face hub",
            fix="write hf:org/name, as in the repository's address",
        )
    hub = require("huggingface_hub", extra="hf", why="open models from the hub")
    try:
        with quiet():
            return Path(hub.snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # all of the hub's own errors are among these
        raise CheckpointError(
            f"{source} cannot be fetched: {one_line(error)}",
            fix="check the name, the network and the login, or give a local folder",
        ) from None
