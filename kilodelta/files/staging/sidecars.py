"""Copy what lies beside the weights of a model folder: configuration, tokenizer, pooling.

A folder may come from anybody. Only regular files inside it are copied, each opened by the
descriptor of its own folder and without following links, so that nothing outside can get into the
result. The one exception is a Hugging Face cache, whose snapshots are links into its own blobs.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from kilodelta.errors import CheckpointError
from kilodelta.files import system
from kilodelta.files.plain import is_file

LIMIT = 1 << 30
"""Bytes of one file; tokenizers take tens of megabytes."""
CHUNK = 1 << 20
"""Bytes copied at a time."""
MODULES_LIMIT = 1 << 20
"""Bytes of a `modules.json` that are read."""

WEIGHTS = frozenset(
    {".bin", ".ckpt", ".distcp", ".engine", ".ggml", ".gguf", ".h5", ".mlmodel", ".mlpackage"}
    | {".msgpack", ".ot", ".pb", ".pdparams", ".plan", ".pt", ".pth", ".safetensors", ".tflite"}
)
"""Suffixes of files that hold weights. Those of the base would be the wrong model."""
OTHER_FORMS = frozenset({"coreml", "flax", "gguf", "onnx", "openvino", "original", "tf"})
"""Folders that hold the base in another form."""

HOLDS_WEIGHTS = "the base's weights in another form"
LEADS_OUT = "a link, a pipe or a device"
TOO_LARGE = f"larger than {LIMIT >> 30} GiB"

_FOLDER = getattr(os, "O_DIRECTORY", 0)
_FLAGS = os.O_RDONLY | system.BINARY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_FLAGS |= getattr(os, "O_CLOEXEC", 0)
_Place: TypeAlias = "int | str"
"""An open folder's descriptor; its path where the system opens no folders (Windows)."""


def copy_sidecars(folder: Path, stage: Path, own: frozenset[str]) -> dict[str, str]:
    """Copy a model folder's files but its weights into a new folder.

    Hidden entries are passed over without a word.

    Args:
        folder: the model folder.
        stage: where the copies go.
        own: names in `folder` that the caller writes itself.

    Returns:
        What was left out: its path in `folder` (folders end in a slash), and why.

    Raises:
        CheckpointError: a file cannot be read.
    """
    walk = _Walk(root=folder.absolute(), blobs=_blobs_of(folder), own=own)
    with _opened_folder(os.fspath(folder)) as descriptor:
        walk.modules.update(_modules(walk, descriptor))
        walk.copy(descriptor, stage, PurePosixPath())
    return dict(sorted(walk.left_out.items()))


@dataclass(frozen=True, kw_only=True)
class _Walk:
    root: Path
    blobs: Path | None
    """Where the links of a Hugging Face snapshot lead; None in any other folder."""

    own: frozenset[str]
    modules: set[str] = field(default_factory=set)
    """Folders of further modules (sentence-transformers), whose weights no delta changes."""

    left_out: dict[str, str] = field(default_factory=dict)

    def copy(self, descriptor: _Place, target: Path, place: PurePosixPath) -> None:
        """Copy the entries of an open folder, which lies at `place`."""
        with os.scandir(descriptor) as entries:
            for entry in sorted(entries, key=lambda item: item.name):
                at_top = not place.parts
                if entry.name.startswith(".") or (at_top and entry.name in self.own):
                    continue
                self._copy_entry(descriptor, entry, target / entry.name, place / entry.name)

    def _copy_entry(
        self, descriptor: _Place, entry: os.DirEntry[str], target: Path, place: PurePosixPath
    ) -> None:
        if entry.is_dir(follow_symlinks=False):
            with _opened_folder(entry.name, descriptor) as inner:
                if self._is_other_form(inner, place):
                    self.left_out[f"{place}/"] = HOLDS_WEIGHTS
                    return
                target.mkdir()
                self.copy(inner, target, place)
        elif holds_weights(entry.name) and str(place.parent) not in self.modules:
            self.left_out[str(place)] = HOLDS_WEIGHTS
        elif why := self._copy_file(descriptor, entry, target, place):
            self.left_out[str(place)] = why

    def _is_other_form(self, descriptor: _Place, place: PurePosixPath) -> bool:
        if str(place) in self.modules:
            return False
        if place.name.lower() in OTHER_FORMS or holds_weights(place.name):
            return True
        with os.scandir(descriptor) as entries:
            return any(holds_weights(entry.name) for entry in entries)

    def _copy_file(
        self, descriptor: _Place, entry: os.DirEntry[str], target: Path, place: PurePosixPath
    ) -> str:
        """Copy a regular file; returns why it was left out, or nothing."""
        name = self.inside(descriptor, entry.name, place)
        if name is None:
            return LEADS_OUT
        with _opened(name, descriptor) as source:
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode):
                return LEADS_OUT
            if status.st_size > LIMIT:
                return TOO_LARGE
            with target.open("xb") as file:
                while part := os.read(source, CHUNK):
                    file.write(part)
                    if file.tell() > LIMIT:
                        raise CheckpointError(
                            f"{self.root / place} grows beyond {LIMIT} bytes while it is copied",
                            fix="let nothing write into the base's folder, and merge again",
                        )
        return ""

    def inside(self, descriptor: _Place, name: str, place: PurePosixPath) -> str | None:
        """Return the name to open an entry by: its own, or that of the blob that it is a link to.

        None for links to anywhere else, and for what is neither file nor link.
        """
        named, within = _named(name, descriptor)
        mode = os.stat(named, dir_fd=within, follow_symlinks=False).st_mode
        if stat.S_ISREG(mode):
            return name
        if self.blobs is None or not stat.S_ISLNK(mode):
            return None
        link = os.readlink(named, dir_fd=within)
        blob = Path(os.path.normpath(self.root / place.parent / link))
        return str(blob) if blob.parent == self.blobs and is_file(blob) else None


def holds_weights(name: str) -> bool:
    """Return whether a file's name says that it holds weights, or an index of such files.

    Example:
        >>> [holds_weights(n) for n in ("model.onnx_data", "tokenizer.json", "consolidated.00.pth")]
        [True, False, True]
    """
    low = name.lower()
    return (
        PurePosixPath(low).suffix in WEIGHTS
        or ".onnx" in low
        or low.endswith(".index.json")
        or low.startswith("openvino_")
        or low == "adapter_config.json"  # without its weights it keeps the folder from opening
    )


def _blobs_of(folder: Path) -> Path | None:
    """Find the blobs of a Hugging Face cache, given `models--org--name/snapshots/<revision>`."""
    place = folder.absolute()
    repository = place.parent.parent
    if place.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return None
    blobs = repository / "blobs"
    return None if blobs.is_symlink() else blobs


def _modules(walk: _Walk, descriptor: _Place) -> frozenset[str]:
    """List the folders that sentence-transformers' `modules.json` names, if it makes sense."""
    name = "modules.json"
    try:
        name = walk.inside(descriptor, name, PurePosixPath(name)) or ""
        with _opened(name, descriptor) as source:
            modules = json.loads(os.read(source, MODULES_LIMIT))
        return frozenset(str(PurePosixPath(m["path"])) for m in modules if m["path"])
    except (OSError, CheckpointError, RecursionError, ValueError, TypeError, KeyError):
        return frozenset()


def _named(name: str, folder: _Place | None) -> tuple[str, int | None]:
    """Return how system calls name an entry of a folder: `dir_fd` and a name, or a whole path."""
    if isinstance(folder, str):
        return os.path.join(folder, name), None
    return name, folder


@contextmanager
def _opened_folder(name: str, folder: _Place | None = None) -> Iterator[_Place]:
    """Open a folder as `_opened` does; where the system cannot, yield its path."""
    if system.HAS_FOLDER_DESCRIPTORS:
        with _opened(name, folder, _FOLDER, follow=folder is None) as descriptor:
            yield descriptor
    else:
        yield _named(name, folder)[0]


@contextmanager
def _opened(
    name: str, folder: _Place | None = None, flags: int = 0, *, follow: bool = False
) -> Iterator[int]:
    """Open a file or folder, yield its descriptor, and close it at the end.

    Raises:
        CheckpointError: it cannot be opened, or cannot be read in the block.
    """
    try:
        named, within = _named(name, folder)
        links = getattr(os, "O_NOFOLLOW", 0) if follow else 0
        descriptor = os.open(named, (_FLAGS | flags) & ~links, dir_fd=within)
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            reason = "it became a link while it was read"
        else:
            reason = problem.strerror or str(problem)
        raise CheckpointError(
            f"{name} in the base's folder cannot be read: {reason}",
            fix="check its permissions, and let nothing write into the folder",
        ) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)
