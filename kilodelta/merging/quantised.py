"""Prove that a quantised model is the base of a file, in whatever layout it is stored."""

from __future__ import annotations

import os
from pathlib import Path

from kilodelta.errors import BaseMismatchError
from kilodelta.files.baseline import explain
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.identity import Identity
from kilodelta.format.grid_names import named_for
from kilodelta.format.manifest import Grid, Manifest
from kilodelta.grid.identity import config_digest
from kilodelta.grid.model import LogicalIdentity, QuantisedModel
from kilodelta.grid.open import is_quantised, open_quantised
from kilodelta.progress import Progress, silent

MIN_CHANGED = 0.01
"""The share of codes below which a merge in the grid has changed almost nothing."""


def grid_of(identity: LogicalIdentity) -> Grid:
    """Describe a quantised base as a manifest does."""
    return Grid(
        logical=identity.root,
        grids=identity.grids,
        plain=identity.plain,
        config=identity.config,
        weights=len(identity.weights),
        kinds=identity.kinds,
    )


def open_base(
    base: str | os.PathLike[str] | Checkpoint | QuantisedModel, manifest: Manifest
) -> QuantisedModel:
    """Open the quantised base of a file, by the names of tensors that the file has.

    Raises:
        BaseMismatchError: it is a float model.
        CheckpointError: it cannot be read.
    """
    if not is_quantised(base):
        place = Path(base) if isinstance(base, str | os.PathLike) else base.path
        if not place.exists():
            Checkpoint.open(place)  # says so
        what = f"the file was made for a quantised base, and {place} is none"
        if place.is_file() and is_quantised(place.parent):
            raise BaseMismatchError(
                f"{what}, but a part of one",
                fix=f"give the folder {place.parent}, which says how it is quantised",
            )
        raise BaseMismatchError(
            what, fix=f"give {manifest.base.name or 'the quantised model'} that it was made for"
        )
    return named_for(open_quantised(base), manifest)


def refuse_quantised(base: str | os.PathLike[str] | Checkpoint, manifest: Manifest) -> None:
    """Refuse a quantised base of a file that was made for a float one.

    Raises:
        BaseMismatchError: it is quantised, so it cannot be that model.
    """
    if manifest.grid is None and is_quantised(base):
        place = base.path if isinstance(base, Checkpoint) else base
        raise BaseMismatchError(
            f"{place} is a quantised model, and the file was made for a float one"
            f" ({manifest.base.name or 'unnamed'})",
            fix="give the model before quantisation, or make a file for this one: kilodelta rebase",
        )


def require_grid_base(
    model: QuantisedModel,
    manifest: Manifest,
    *,
    cached: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Identity:
    """Check that a quantised model is the base of a file, in any layout.

    Of an ONNX graph the logical root alone counts.

    Args:
        model: the model that was given.
        manifest: the file's, with a `grid`.
        cached: let remembered digests say so at first, of a base in the very layout that the file
            was made for. A caller that takes this hint must hash what it reads later on.
        threads: cores to use; all by default.
        progress: receives how far the work is.

    Returns:
        the identity over its stored tensors.

    Raises:
        BaseMismatchError: it is another model; says what differs.
        CheckpointError: it cannot be read.
    """
    wanted = manifest.grid
    assert wanted is not None  # callers ask for files of quantised bases only
    if cached:
        hint = model.stored_identity(cached=True, threads=threads, progress=progress)
        same = (manifest.base.root, wanted.config)
        if (hint.root, config_digest(model.config)) == same:  # so the numbers are the same as well
            return hint
    stored = model.stored_identity(threads=threads, progress=progress)
    found = grid_of(model.identity(threads=threads, progress=progress))
    # The other initializers of a graph have names and shapes that its exporter made up.
    is_graph = model.method == "onnx"
    if found.logical == wanted.logical and (is_graph or found.plain == wanted.plain):
        return stored
    same_layout = len(stored.tensors) == manifest.base.tensors
    raise BaseMismatchError(
        f"{model.path} is not the base of this file\n{differences(found, wanted)}"
        + (f"\n{explain(stored, manifest.base.fingerprints)}" if same_layout else ""),
        fix=f"give the exact revision of {manifest.base.name or 'the base'}, quantised as the"
        " file's base was; another layout of the same numbers will do",
    )


def require_same_numbers(held: Grid, manifest: Manifest, where: str) -> None:
    """Check that a file was made for the quantised base that something else was made of.

    Args:
        held: what that base is.
        manifest: the file's.
        where: what was made of the base, for the message.

    Raises:
        BaseMismatchError: the file was made for a float model, or for another quantised one.
    """
    wanted = manifest.grid
    if wanted is None:
        raise BaseMismatchError(
            f"{where} holds a quantised base ({', '.join(held.kinds)}), and the file was made for"
            f" a float one ({manifest.base.name or 'unnamed'})",
            fix="make the file for this one, with the quantised model as BASE:"
            " kilodelta rebase BASE FILE -o OUT",
        )
    if (wanted.logical, wanted.plain) != (held.logical, held.plain):
        raise BaseMismatchError(
            f"{where} does not hold the quantised base of this file\n{differences(held, wanted)}",
            fix="apply it where its own base is, or make one for this base: kilodelta rebase",
        )


def differences(found: Grid, wanted: Grid) -> str:
    """Say how a quantised model differs from the one that a file was made for, line by line."""
    lines = []
    if found.weights != wanted.weights:
        lines.append(f"  it has {found.weights} quantised weights, the base {wanted.weights}")
    if found.kinds != wanted.kinds:
        lines.append(
            f"  its grids are {', '.join(found.kinds)}; the base's {', '.join(wanted.kinds)}"
        )
    elif found.grids != wanted.grids:
        lines.append("  its scales or zero points are others")
    elif found.logical != wanted.logical:
        lines.append("  its scales are the base's, but its codes are others: merged already?")
    if found.plain != wanted.plain:
        lines.append("  tensors that are not quantised differ")
    lines.append(
        f"  expected logical root {wanted.logical}\n  found    logical root {found.logical}"
    )
    return "\n".join(lines)
