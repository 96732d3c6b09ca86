"""What a compression kept and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kilodelta.compress.distill.changes import Change
from kilodelta.compress.distill.objective import Measures


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of `compress`; measures are on held-out inputs, None without inputs."""

    path: Path
    method: Mapping[str, str | int]
    bits: int
    nbytes: Mapping[str, int]
    """Bytes by part (coefficients, extras, header) and of the whole file."""
    tuned_bytes: int
    output: str
    """The output that was matched."""
    kind: str
    """What `agreement` counts: `top-1` or `cosine`."""
    held_out: int
    before: Measures | None
    """The base model against the tuned one."""
    after: Measures | None
    """Base plus this file against the tuned one."""
    weight_error: float
    targets: int
    extras: tuple[str, ...]
    dropped: tuple[Change, ...]
    """Changed tensors that the file does not carry."""
    dropped_energy: float
    """Their share of the change's energy, 0 to 1."""
    steps: int
    seconds: float
    interrupted: bool
    result: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = asdict(self)
        found["path"] = str(self.path)
        found["dropped"] = [change.name for change in self.dropped]
        return found
