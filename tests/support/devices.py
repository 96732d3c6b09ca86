"""A device folder of the linear model in numpy, two fine-tunes for it, and what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kilodelta.device import Device, status
from kilodelta.device.folder.journal import Journal
from kilodelta.device.golden import golden
from kilodelta.device.golden.golden import Golden
from kilodelta.format.delta import Delta
from tests.doubles import numpy_device
from tests.doubles.numpy_device import BATCH, TOLERANCE

SEEDS = {"a": 1, "b": 2}


class Bench:
    """A base, its device folder, and two fine-tunes with what they compute.

    Tests have to put `numpy_device.StandIn` into the place of patch mode.
    """

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root = root
        self.base = numpy_device.base(root / "base.safetensors")
        self.device = numpy_device.folder(root / "device", self.base, **settings)
        self.files = {name: self.save(name, seed) for name, seed in SEEDS.items()}
        self.outputs = {"base": self.expected(None)}
        self.outputs |= {name: self.expected(file) for name, file in self.files.items()}

    def save(self, name: str, seed: int, **options: Any) -> Path:
        """Write a fine-tune; `options` are its version, probes and extras."""
        return self.write(name, numpy_device.delta(self.base, seed, **options))

    def write(self, name: str, delta: Delta) -> Path:
        delta.save(self.root / f"{name}.kd")
        return self.root / f"{name}.kd"

    def probed(
        self, name: str, *, outputs: Any, dtype: str = "float32", limit: Any = TOLERANCE
    ) -> Path:
        """The fine-tune `a` or `b` with a probe that states `outputs` and `limit`."""
        known = Golden(inputs={"x": BATCH["x"][:2]}, outputs=outputs)
        probes = golden.to_probes(known, {dtype: dict.fromkeys(outputs, limit)})
        return self.save(f"{name}-probed", SEEDS[name], probes=probes)

    def change_bundle(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change what `bundle.json` says."""
        place = self.device / "bundle.json"
        table = json.loads(place.read_text())
        change(table)
        place.write_text(json.dumps(table))

    def expected(self, file: Path | None) -> np.ndarray[Any, Any]:
        return Device(self.device).run(BATCH, file or "base")["y"]

    def serves(self, *, check: bool = False) -> str:
        """The name of what is served, by its outputs; with `check` every byte is read as well."""
        if check:
            status(self.device, check=True)
        served = Device(self.device).run(BATCH)["y"]
        return next(n for n, known in self.outputs.items() if np.array_equal(served, known))

    def entries(self) -> list[Any]:
        return Journal(self.device / "journal").entries()

    def events(self) -> list[str]:
        return [entry["event"] for entry in self.entries()]

    def is_clean(self) -> bool:
        """Whether nothing lies about but what the state names."""
        names = {path.name for path in (self.device / "deltas").iterdir()}
        stages = [path for path in self.device.iterdir() if path.name.endswith(".tmp")]
        return names == status(self.device).state.names() and not stages
