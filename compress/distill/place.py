"""Where the result may be written: beside the models, never over them, and over nothing unasked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kilodelta.errors import OutputError


def check_place(
    out: Path, inputs: Mapping[str, Path], *, force: bool, resume: bool = False
) -> None:
    """Check that a file may be written, before any work.

    Args:
        out: the file to write.
        inputs: by what each is called, the files and folders that are read.
        force: whether a file that exists may be replaced.
        resume: whether `out` is the result of the interrupted run that goes on.

    Raises:
        OutputError: `out` is a folder or in none, is among the inputs, or exists.

    Example:
        >>> check_place(Path("no-such-file.kd"), {}, force=False)
    """
    if out.is_dir():
        raise OutputError(f"{out} is a folder", fix=f"name a file, such as {out / 'task.kd'}")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent} is no folder", fix="make the folder first")
    if not os.access(out.parent, os.W_OK):
        raise OutputError(f"{out.parent} cannot be written to", fix="give another folder with -o")
    if not os.path.lexists(out):
        return
    for what, path in inputs.items():
        if _is_of(out, path):
            raise OutputError(
                f"{out} belongs to {what} {path}, which is read and never written",
                fix="give another name with -o",
            )
    if not out.is_file() or out.is_symlink():
        raise OutputError(f"{out} exists and is no plain file", fix="give another name with -o")
    if not force and not resume:
        raise OutputError(
            f"{out} exists already", fix="give another name with -o, or replace it with --force"
        )


def _is_of(out: Path, path: Path) -> bool:
    """Return whether a file is an input itself, or one of an input's folder, under any name.

    An earlier result that was written into a model's folder is none of the model's files.
    """
    try:
        if path.is_dir():
            inside = out.resolve().is_relative_to(path.resolve()) and out.suffix != ".kd"
            return inside or any(os.path.samefile(out, file) for file in _files(path))
        return path.exists() and os.path.samefile(out, path)
    except OSError:
        return False


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and path.suffix != ".kd"]
