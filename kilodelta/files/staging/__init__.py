"""Write results in full or not at all, and leave nothing behind of what was killed.

`room.py` asks for room before a work begins; `publish.py` gives a finished file or folder its name
in one rename; `stage.py` makes the private folders in which it is made, and sweeps those of dead
processes; `sidecars.py` copies into them what lies beside a model's weights.
"""

from kilodelta.files.staging.publish import new_file as new_file
from kilodelta.files.staging.publish import new_files as new_files
from kilodelta.files.staging.publish import new_folder as new_folder
from kilodelta.files.staging.publish import require_free as require_free
from kilodelta.files.staging.publish import scratch as scratch
from kilodelta.files.staging.publish import sync as sync
from kilodelta.files.staging.publish import write as write
from kilodelta.files.staging.room import Need as Need
from kilodelta.files.staging.room import require_room as require_room
from kilodelta.files.staging.stage import is_stage as is_stage
from kilodelta.files.staging.stage import sweep as sweep
from kilodelta.files.staging.stage import sweep_temporary as sweep_temporary

__all__ = [
    "Need",
    "is_stage",
    "new_file",
    "new_files",
    "new_folder",
    "require_free",
    "require_room",
    "scratch",
    "sweep",
    "sweep_temporary",
    "sync",
    "write",
]
