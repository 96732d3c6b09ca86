"""A device folder: what lies where, checked once when it is opened, and passed on as one object.

::

    device/
      bundle.json     what the folder is: mode, precision, the base's root, digests; never changes
      base/           the base's artefact and what maps a delta onto it; never changes
      deltas/         one folder per fine-tune, complete before it has its name, never changed after
      current         which of them is served: one small file, replaced by one rename
      journal         what was done, one JSON object per line
      lock            held while a command changes the folder
      baseline.npz    what this device computes with the base, remembered
      trust.json      keys, task and kind, where the device takes signed releases only
      root.json       the first root of the mirror that releases are pulled from
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import kilodelta
from kilodelta.device.folder.bundle import (
    TENSORS_LIMIT,
    BaseTensors,
    Bundle,
    read_bundle,
    read_json,
    read_tensors,
    write_bundle,
    write_tensors,
)
from kilodelta.device.folder.journal import Journal
from kilodelta.device.folder.state import State, read_state, write_state
from kilodelta.errors import DeviceError
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.files import canonical, plain, staging
from kilodelta.files.identity import Identity
from kilodelta.files.tensor import TensorInfo
from kilodelta.merging.outline import Outline, outline_to_json, parse_outline
from kilodelta.trust.policy import Pins, parse_pins

_BUNDLE, _TENSORS, _QUANTISED = "bundle.json", "tensors.json", "quantised.json"
_TRUST_LIMIT = 64 << 10


@dataclass(frozen=True)
class DeviceFolder:
    """A device folder whose bundle was read and whose parts are what they should be.

    Attributes:
        root: its path.
        bundle: what it is.
    """

    root: Path
    bundle: Bundle

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> DeviceFolder:
        """Open a device folder, and see that neither it nor its base holds links or pipes.

        Raises:
            DeviceError: it is no device folder, or a damaged one.
        """
        root = Path(folder)
        for name in (_BUNDLE, "base", "deltas"):
            if not os.path.lexists(root / name):
                raise DeviceError(
                    f"{root} is not a device folder: it has no {name}",
                    fix="make one on a build machine: kilodelta bundle BASE -o device/ --mode ...",
                )
        for name in ("base", "deltas"):
            if not plain.is_folder(root / name):
                raise _unusable(root / name, plain.kind(root / name))
        _require_plain(root / "base")
        return cls(root, read_bundle(root / _BUNDLE))

    @classmethod
    def create(
        cls,
        root: Path,
        bundle: Bundle,
        *,
        infos: Mapping[str, TensorInfo],
        identity: Identity,
        outline: Outline | None = None,
    ) -> DeviceFolder:
        """Make a device folder, serving its base, of a folder whose `base/` is filled.

        Args:
            root: the folder; nothing but `base/` is in it.
            bundle: what it is; its files are found in `base/`.
            infos: what the base's tensors are, by name.
            identity: their digests.
            outline: of a quantised base, what its codes and scales are.

        Raises:
            OutputError: it cannot be written.
        """
        base = root / "base"
        (root / "deltas").mkdir()
        write_tensors(base / _TENSORS, infos, identity)
        if outline is not None:
            staging.write(base / _QUANTISED, canonical.dumps(outline_to_json(outline)).encode())
        files = tuple(file_fact(path) for path in sorted(base.iterdir()))
        bundle = replace(bundle, files=files, tool=f"kilodelta {kilodelta.__version__}")
        write_bundle(root / _BUNDLE, bundle)
        folder = cls(root, bundle)
        write_state(folder.current, State())
        folder.journal.append("bundled", 0, state=State().to_json())
        return folder

    @property
    def base(self) -> Path:
        """Where the base's artefact lies."""
        return self.root / "base"

    @property
    def deltas(self) -> Path:
        """Where the fine-tunes lie."""
        return self.root / "deltas"

    @property
    def current(self) -> Path:
        """The file that says which of them is served."""
        return self.root / "current"

    @property
    def lock(self) -> Path:
        """The file that is locked while the folder changes."""
        return self.root / "lock"

    @property
    def remembered(self) -> Path:
        """The file that holds what this device computes with the base."""
        return self.root / "baseline.npz"

    @property
    def trust(self) -> Path:
        """The file that holds the pinned keys; missing where none are."""
        return self.root / "trust.json"

    @property
    def mirror_root(self) -> Path:
        """The file that holds the first root of the mirror; missing where there is no mirror."""
        return self.root / "root.json"

    @property
    def pins(self) -> Pins | None:
        """What a signed release must be covered by; None on a device that takes unsigned ones.

        Raises:
            DeviceError: `trust.json` is damaged: then nothing is taken.
        """
        if not os.path.lexists(self.trust):
            return None
        return read_json(self.trust, _TRUST_LIMIT, parse_pins)

    @property
    def journal(self) -> Journal:
        """What was done to the folder."""
        return Journal(self.root / "journal")

    @property
    def state(self) -> State:
        """What is served now, read anew each time.

        Raises:
            DeviceError: `current` is missing or damaged.
        """
        return read_state(self.current)

    @cached_property
    def tensors(self) -> BaseTensors:
        """What the base's tensors are.

        Raises:
            DeviceError: `base/tensors.json` is damaged, or is another base's.
        """
        place = self.base / _TENSORS
        tensors = read_tensors(place)
        if tensors.identity.root != self.bundle.base_root:
            raise _unusable(place, f"gives the root {tensors.identity.root}, the bundle another")
        return tensors

    @cached_property
    def outline(self) -> Outline | None:
        """What the base is where it is quantised; None of a float one.

        Raises:
            DeviceError: `base/quantised.json` is damaged.
        """
        place = self.base / _QUANTISED
        if not os.path.lexists(place):
            return None
        stored = {info.name: info for info in self.tensors.infos}
        return read_json(place, TENSORS_LIMIT, lambda value: parse_outline(value, stored))

    @property
    def changeable(self) -> tuple[TensorInfo, ...]:
        """What a delta may change: all tensors, and of a quantised base its weights.

        Raises:
            DeviceError: what the folder says of its base is damaged.
        """
        if self.outline is None:
            return self.tensors.infos
        return self.outline.infos({info.name: info for info in self.tensors.infos})

    def fine_tune(self, name: str) -> Path:
        """Return the folder of a fine-tune, having seen that it holds regular files only.

        Raises:
            DeviceError: it holds something else, or is missing.
        """
        place = self.deltas / name
        if not plain.is_folder(place):
            raise DeviceError(f"{place} {plain.kind(place)}", fix="apply the file again")
        _require_plain(place)
        return place


def _require_plain(folder: Path) -> None:
    try:
        entry = plain.unplain(folder)
    except OSError as problem:
        raise _unusable(folder, f"cannot be read: {problem.strerror}") from None
    if entry is not None:
        raise _unusable(*entry)


def _unusable(path: Path, why: str) -> DeviceError:
    return DeviceError(
        f"{path} {why}", fix="copy the bundle to the device again, files instead of links"
    )
