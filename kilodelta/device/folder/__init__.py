"""Keep a device folder: what it is, what it serves, and what was done to it.

`DeviceFolder` is opened and checked once, at the door, and passed on; `changing` is the only way to
change one. `Bundle` says what was deployed and never changes; `State` says what is served and
changes by one rename; the journal says what was done.
"""

from kilodelta.device.folder.bundle import Bundle as Bundle
from kilodelta.device.folder.change import FolderChange as FolderChange
from kilodelta.device.folder.change import changing as changing
from kilodelta.device.folder.device_folder import DeviceFolder as DeviceFolder
from kilodelta.device.folder.state import Served as Served
from kilodelta.device.folder.state import State as State

__all__ = ["Bundle", "Change", "DeviceFolder", "Served", "State", "changing"]
