"""The folder of one fine-tune: its file, what its mode built, and `facts.json` over all of them."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from kilodelta.device.bundle import check_files, file_of
from kilodelta.device.modes import DELTA, Mode
from kilodelta.errors import DeviceError, FileError
from kilodelta.export import fields
from kilodelta.export.artefacts import file_fact
from kilodelta.export.facts import FileFact
from kilodelta.format import atomic, canonical
from kilodelta.format.delta import Delta

FACTS = "facts.json"


def copy(file: Path, stage: Path) -> str:
    """Take a `.kd` file into a stage; returns the SHA-256 of the copy."""
    shutil.copyfile(file, stage / DELTA)
    return file_fact(stage / DELTA).sha256


def build(mode: Mode, delta: Delta, folder: Path, file: Path, digest: str) -> None:
    """Write a fine-tune's folder, in full or not at all.

    Raises:
        FileError: the file changed since it was proved.
        OutputError: the disk is full or not writable.
    """
    with atomic.new_folder(folder) as stage:
        if copy(file, stage) != digest:
            raise FileError(f"{file} changed while it was read", fix="apply it again")
        mode.build(delta, stage)
        write_facts(stage)


def write_facts(folder: Path) -> None:
    """Write down what a folder holds."""
    facts = [asdict(file_fact(path)) for path in sorted(folder.iterdir())]
    (folder / FACTS).write_text(canonical.dumps(facts), encoding="utf-8")


def check(folder: Path) -> None:
    """See that a folder holds byte for byte what was built.

    Raises:
        DeviceError: `facts.json` is missing or damaged.
        ProofError: another file is.
    """
    check_files(folder, _facts(folder / FACTS))


def _facts(path: Path) -> tuple[FileFact, ...]:
    try:
        return fields.listed(canonical.loads(path.read_bytes()), "facts", file_of)
    except (OSError, ValueError) as problem:
        raise DeviceError(f"{path} is wrong: {problem}", fix="apply the file again") from None
