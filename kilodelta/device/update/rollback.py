"""`kilodelta rollback`: serve again what was served before; it still lies there, probed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from kilodelta.device.folder.change import changing
from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.folder.fine_tune import check_fine_tune
from kilodelta.device.folder.state import State


@dataclass(frozen=True, kw_only=True)
class RolledBack:
    """What a `rollback` did.

    Attributes:
        state: what is served now.
        before: what was served.
        warnings: what went wrong after the rollback, which stands.
    """

    state: State
    before: State
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**self.state.to_json(), "warnings": list(self.warnings)}


def rollback(folder: str | os.PathLike[str]) -> RolledBack:
    """Serve again what a device folder served before; its bytes are checked first.

    Args:
        folder: the device folder.

    Raises:
        DeviceError: no device folder, or nothing to go back to.
        LockedError: another command is changing it.
        ProofError: what lies there is not what was built.
        OutputError: the folder cannot be written.

    Example:
        >>> rollback("device/").state.serving.version  # doctest: +SKIP
        6
    """
    with changing(DeviceFolder.open(folder)) as change:
        after = change.before.rolled_back()
        if after.serving.folder:
            check_fine_tune(change.folder.fine_tune(after.serving.folder))
        warnings = change.commit(after, "rolled back")
    return RolledBack(state=after, before=change.before, warnings=warnings)
