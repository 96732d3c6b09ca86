"""The folder of one fine-tune: its file, what its mode built, and `facts.json` over all of them."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kilodelta.device.folder.bundle import check_files, file_of
from kilodelta.device.modes.interface import DELTA, Mode, Session
from kilodelta.errors import DeviceError, FileError
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.export.manifest.facts import FileFact
from kilodelta.files import canonical, staging, untrusted
from kilodelta.format.delta import Delta

FACTS = "facts.json"


def copy(file: Path, stage: Path) -> str:
    """Take a `.kd` file into a stage; returns the SHA-256 of the copy."""
    shutil.copyfile(file, stage / DELTA)
    return file_fact(stage / DELTA).sha256


def build(mode: Mode, delta: Delta, folder: Path, file: Path, digest: str) -> Session:
    """Write a fine-tune's folder, in full or not at all; returns it opened, for the probe.

    The runtime opens what was built while it is hashed.

    Raises:
        FileError: the file changed since it was proved.
        OutputError: the disk is full or not writable.
    """
    with staging.new_folder(folder) as stage:
        if copy(file, stage) != digest:
            raise FileError(f"{file} changed while it was read", fix="apply it again")
        mode.build(delta, stage)
        with ThreadPoolExecutor(1) as pool:
            facts = pool.submit(_facts_of, stage)
            session = mode.open(stage)
        (stage / FACTS).write_text(canonical.dumps(facts.result()), encoding="utf-8")
    return session


def _facts_of(folder: Path) -> list[dict[str, Any]]:
    """What a folder holds."""
    return [asdict(file_fact(path)) for path in sorted(folder.iterdir())]


def check(folder: Path) -> None:
    """See that a folder holds byte for byte what was built.

    Raises:
        DeviceError: `facts.json` is missing or damaged.
        ProofError: another file is.
    """
    check_files(folder, _facts(folder / FACTS))


def _facts(path: Path) -> tuple[FileFact, ...]:
    try:
        return untrusted.listed(canonical.loads(path.read_bytes()), "facts", file_of)
    except (OSError, ValueError) as problem:
        raise DeviceError(f"{path} is wrong: {problem}", fix="apply the file again") from None
