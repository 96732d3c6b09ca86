"""Serve fine-tunes of kilobytes on devices: a folder that holds one base and takes `.kd` files.

`bundle` and `release` run on a build machine, with torch. `apply`, `rollback`, `status` and `run`
are the commands of the same names; they need neither torch nor onnx. A service keeps a `Device`
open. `folder/` keeps what lies on the disk, `modes/` brings a fine-tune into a runtime, `golden/`
judges it, `update/` changes what is served, `make/` makes folders and releases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.device.folder.bundle import Bundle as Bundle
    from kilodelta.device.folder.state import Served as Served
    from kilodelta.device.folder.state import State as State
    from kilodelta.device.folder.status import Status as Status
    from kilodelta.device.folder.status import status as status
    from kilodelta.device.make.build import bundle as bundle
    from kilodelta.device.make.release import Released as Released
    from kilodelta.device.make.release import release as release
    from kilodelta.device.serving import Device as Device
    from kilodelta.device.serving import run as run
    from kilodelta.device.update.apply import Applied as Applied
    from kilodelta.device.update.apply import apply as apply
    from kilodelta.device.update.rollback import RolledBack as RolledBack
    from kilodelta.device.update.rollback import rollback as rollback
    from kilodelta.device.update.trust import Trusted as Trusted
    from kilodelta.device.update.trust import pull as pull
    from kilodelta.device.update.trust import trust as trust

_WHERE = {
    "Applied": "kilodelta.device.update.apply",
    "Bundle": "kilodelta.device.folder.bundle",
    "Device": "kilodelta.device.serving",
    "Released": "kilodelta.device.make.release",
    "RolledBack": "kilodelta.device.update.rollback",
    "Served": "kilodelta.device.folder.state",
    "State": "kilodelta.device.folder.state",
    "Status": "kilodelta.device.folder.status",
    "Trusted": "kilodelta.device.update.trust",
    "apply": "kilodelta.device.update.apply",
    "bundle": "kilodelta.device.make.build",
    "pull": "kilodelta.device.update.trust",
    "release": "kilodelta.device.make.release",
    "rollback": "kilodelta.device.update.rollback",
    "run": "kilodelta.device.serving",
    "status": "kilodelta.device.folder.status",
    "trust": "kilodelta.device.update.trust",
}

__all__ = [
    "Applied",
    "Bundle",
    "Device",
    "Released",
    "RolledBack",
    "Served",
    "State",
    "Status",
    "Trusted",
    "apply",
    "bundle",
    "pull",
    "release",
    "rollback",
    "run",
    "status",
    "trust",
]

__getattr__, __dir__ = lazy(__name__, _WHERE)
