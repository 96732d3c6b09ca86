"""What lies where in a device folder.

::

    device/
      bundle.json     what the folder is: mode, precision, the base's root, digests; never changes
      base/           the base's artefact and what maps a delta onto it; never changes
      deltas/         one folder a fine-tune, complete before it has its name, never changed after
      current         which of them is served: one small file, replaced by one rename
      journal         what was done, one JSON object a line
      lock            held while a command changes the folder
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kilodelta.errors import DeviceError


@dataclass(frozen=True)
class Places:
    """The paths of a device folder."""

    root: Path

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Places:
        """An existing device folder.

        Raises:
            DeviceError: it is none.
        """
        places = cls(Path(folder))
        for part in (places.bundle, places.base, places.deltas):
            if not part.exists():
                raise DeviceError(
                    f"{places.root} is not a device folder: it has no {part.name}",
                    fix="make one on a build machine: kilodelta bundle BASE -o device/ --mode ...",
                )
        return places

    @property
    def bundle(self) -> Path:
        return self.root / "bundle.json"

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def deltas(self) -> Path:
        return self.root / "deltas"

    @property
    def current(self) -> Path:
        return self.root / "current"

    @property
    def journal(self) -> Path:
        return self.root / "journal"

    @property
    def lock(self) -> Path:
        return self.root / "lock"
