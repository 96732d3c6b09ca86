"""Prove everything that a GPU machine can prove, in one command without network:

    python -m kilodelta.verify.gpu -o report/

It compares merges with the CPU's, proves and times exported artefacts, and measures speed. It
writes `gpu.json` and `gpu.txt`, and exits with 0 if nothing failed, 6 if something did, and 77
(test harnesses read it as "skipped") without a CUDA device. Measurements neither pass nor fail.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kilodelta.errors import KiloDeltaError, ProofError
from kilodelta.export.tensorrt import cuda
from kilodelta.files import staging
from kilodelta.verify.environment import packages
from kilodelta.verify.gpu.part import Part, PartRow, Setting, run
from kilodelta.verify.parity.result import FAILED, NOT_RUN, Json

SKIPPED = 77
PARTS = ("exactness", "parity", "speed")
PACKAGES = (
    "kilodelta", "torch", "triton", "numpy", "numba", "onnxruntime-gpu", "onnxruntime", "tensorrt",
    "tensorrt-rtx-cu13", "peft", "transformers",
)  # fmt: skip
Work = Callable[[Setting], Iterator[PartRow]]


@dataclass(frozen=True, kw_only=True)
class MachineProof:
    """The machine, and the parts in the order in which they ran."""

    machine: Json
    parts: tuple[Part, ...]

    @property
    def exit_code(self) -> int:
        """0, the code of a failed proof, or `SKIPPED` if no part ran."""
        statuses = {part.status for part in self.parts}
        if FAILED in statuses:
            return ProofError.exit_code
        return SKIPPED if statuses == {NOT_RUN} else 0

    def to_json(self) -> Json:
        """Return everything, fit for strict JSON."""
        return {"machine": self.machine, "parts": [part.to_json() for part in self.parts]}

    def text(self) -> str:
        """Return one table, with a line per row."""
        rows = [
            (part.name, row.status, row.what, row.found) for part in self.parts for row in part.rows
        ]
        wide = [max(len(row[column]) for row in rows) for column in range(3)]
        head = [f"{key}: {value}" for key, value in self.machine.items()]
        lines = [
            "  ".join(
                (*(cell.ljust(size) for cell, size in zip(row[:3], wide, strict=True)), row[3])
            )
            for row in rows
        ]
        return "\n".join((*head, "", *lines)) + "\n"


def describe() -> Json:
    """Return device, driver and versions by name."""
    facts: Json = {"date": time.strftime("%Y-%m-%d"), "system": platform.platform()}
    facts["python"] = platform.python_version()
    try:
        driver = cuda.driver()
        facts["devices"] = "; ".join(
            f"{gpu.name}, {gpu.sm}, {gpu.memory_bytes >> 20} MiB" for gpu in driver.gpus()
        )
        facts["driver"] = "CUDA " + ".".join(map(str, driver.version()))
    except cuda.CudaError as error:
        facts["devices"] = f"none: {error}"
    facts["torch for"] = packages.torch_cuda() or "CPU only"
    facts["versions"] = ", ".join(f"{n} {v}" for n in PACKAGES if (v := packages.version(n)))
    return facts


def parts() -> dict[str, Work]:
    """Return the parts by name; importing them needs torch."""
    from kilodelta.verify.gpu.exact import exact
    from kilodelta.verify.gpu.parity import parity
    from kilodelta.verify.gpu.speed import speed

    return dict(zip(PARTS, (exact, parity, speed), strict=True))


def no_device() -> str:
    """Return why nothing can run here; empty if it can."""
    try:
        import torch
    except ModuleNotFoundError:
        return "no CUDA device: torch is not installed"
    return "" if torch.cuda.is_available() else "no CUDA device"


def prove(
    device: str = "cuda", *, small: bool = False, only: Sequence[str] = PARTS
) -> MachineProof:
    """Run parts on a device.

    Args:
        device: such as `cuda:0`; with `small` also `cpu`.
        small: use pico models, to try the parts themselves.
        only: names of parts.
    """
    why = no_device() if device.startswith("cuda") else ""
    if why:
        row = PartRow(what="all of it", found=f"not run: {why}", status=NOT_RUN)
        skipped = tuple(Part(name=name, rows=(row,)) for name in only)
        return MachineProof(machine=describe(), parts=skipped)
    done, table = [], parts()
    for name in only:
        work = table[name]
        with staging.scratch() as folder:
            done.append(run(name, work, Setting(device=device, folder=folder, small=small)))
    return MachineProof(machine=describe(), parts=tuple(done))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m kilodelta.verify.gpu", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="a new folder for the report")
    parser.add_argument("--device", default="cuda", help="cuda, or cuda:N")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="some of the parts")
    given = parser.parse_args(arguments)
    try:
        with staging.new_folder(given.out) as stage:
            proof = prove(given.device, only=given.only)
            text = proof.text()
            (stage / "gpu.json").write_text(json.dumps(proof.to_json(), indent=2) + "\n")
            (stage / "gpu.txt").write_text(text)
    except KiloDeltaError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(text)
    return proof.exit_code
