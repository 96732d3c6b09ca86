"""Find a model's files: a path, or `hf:org/name` for a repository of the Hugging Face hub.

Only the prefix sends a name to the network. A mistyped path therefore never becomes a download.
"""

from __future__ import annotations

import re
from pathlib import Path

from kilodelta.errors import CheckpointError, InputError, require
from kilodelta.models.quiet import quiet

PREFIX = "hf:"
_REPOSITORY = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")
# Weights as safetensors, configuration and tokenizer: no pickles, and no Python to run.
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def is_hub_name(source: str) -> bool:
    """Return whether a text names a repository of the hub.

    Example:
        >>> is_hub_name("hf:org/name"), is_hub_name("org/name")
        (True, False)
    """
    return source.startswith(PREFIX)


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


def fetch(source: str) -> Path:
    """Download `hf:org/name`, or find it in the cache, and return the snapshot's folder.

    Raises:
        InputError, CheckpointError, MissingPackageError: as `locate`.
    """
    name = source.removeprefix(PREFIX)
    if _REPOSITORY.fullmatch(name) is None:
        raise InputError(
            f"{source!r:.120} names no repository of the Hugging Face hub",
            fix="write hf:org/name, as in the repository's address",
        )
    hub = require("huggingface_hub", extra="hf", why="open models from the hub")
    try:
        with quiet():
            return Path(hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:  # all of the hub's own errors are among these
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error))
        raise CheckpointError(
            f"{source} cannot be fetched: {reason}",
            fix="check the name, the network and the login, or give a local folder",
        ) from None
