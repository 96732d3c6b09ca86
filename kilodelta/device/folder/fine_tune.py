"""The folder of one fine-tune: its file, what its mode built, and `facts.json` over all of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from kilodelta.device.folder.bundle import file_of
from kilodelta.errors import DeviceError, FileError, ProofError
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.manifest.facts import FileFact
from kilodelta.files import canonical, plain, staging, untrusted

DELTA, FACTS = "delta.kd", "facts.json"
"""The fine-tune's own file, in any mode; and the digests of all others."""

_LIMIT = 1 << 20

S = TypeVar("S")


def build_fine_tune(
    folder: Path,
    file: Path,
    digest: str,
    *,
    fill: Callable[[Path], None],
    open_: Callable[[Path], S],
) -> S:
    """Write a fine-tune's folder, in full or not at all; return it opened, for the probe.

    Args:
        folder: its path, which no fine-tune has or had.
        file: the `.kd` file.
        digest: `sha256:<hex>` of `file` when it was proved.
        fill: writes into a folder that holds the file what the mode needs.
        open_: opens such a folder; it runs while the files are hashed.

    Raises:
        FileError: the file changed since it was proved.
        OutputError: the disk is full or not writable.
    """
    with staging.new_folder(folder) as stage:
        shutil.copyfile(file, stage / DELTA)
        if file_fact(stage / DELTA).sha256 != digest:
            raise FileError(f"{file} changed while it was read", fix="apply it again")
        fill(stage)
        with ThreadPoolExecutor(1) as pool:
            facts = pool.submit(_facts_of, stage)
            opened = open_(stage)
        (stage / FACTS).write_text(canonical.dumps(facts.result()), encoding="utf-8")
    return opened


def _facts_of(folder: Path) -> list[dict[str, Any]]:
    return [asdict(file_fact(path)) for path in sorted(folder.iterdir())]


def check_fine_tune(folder: Path) -> None:
    """See that a fine-tune's folder holds byte for byte what was built.

    Raises:
        DeviceError: `facts.json` is missing or damaged.
        ProofError: another file is.
    """
    place = folder / FACTS
    try:
        facts = untrusted.listed(canonical.loads(plain.read(place, _LIMIT)), "facts", file_of)
    except (OSError, ValueError) as problem:
        raise DeviceError(f"{place} is wrong: {problem}", fix="apply the file again") from None
    check_files(folder, facts)


def check_files(folder: Path, files: Sequence[FileFact]) -> None:
    """See that a folder holds files byte for byte, reading them all.

    Raises:
        ProofError: names the first that is missing or changed.
    """
    for file in files:
        place = folder / file.file
        difference = _difference(place, file)
        if difference:
            raise ProofError(
                f"{place} {difference}; it was {file.nbytes} bytes, {file.sha256}",
                fix="apply the file again; for a file of base/ copy the bundle again",
            )


def _difference(place: Path, wanted: FileFact) -> str:
    """Explain what is wrong with a file; empty if nothing."""
    try:
        if not plain.is_file(place):
            return plain.kind(place)
        size = place.lstat().st_size
        if size != wanted.nbytes:  # known before a byte is read
            return f"is {size} bytes"
        actual = file_fact(place)
    except OSError as problem:
        return f"cannot be read: {problem.strerror}"
    return "" if actual == wanted else f"is {actual.nbytes} bytes, {actual.sha256}"
