"""Make hundreds of fine-tunes for many targets, from one TOML file, and go on where a run stopped.

`schema.py` reads the file, field by field with `fields.py`, into what `definition.py` describes.
`graph.py` makes tasks whose names are digests of everything that they depend on, and `record.py`
sees which results are whole. `work.py` does one task with the library's own functions, `child.py`
gives it a folder that takes its name when it is whole, `processes.py` gives it a process, forked
from the one that `server/` prepares, and `local.py`, `shard` in it, and `on_ray.py` run all of
them. There is no scheduler here beyond a pool of threads: resuming is running again, because what
is whole is not redone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kilodelta.lazy import lazy

if TYPE_CHECKING:
    from kilodelta.fleet.definition import Fleet as Fleet
    from kilodelta.fleet.graph import Plan as Plan
    from kilodelta.fleet.graph import make_plan as make_plan
    from kilodelta.fleet.local import run as run
    from kilodelta.fleet.schema import read_fleet as read_fleet

_WHERE = {
    "Fleet": "kilodelta.fleet.definition",
    "Plan": "kilodelta.fleet.graph",
    "make_plan": "kilodelta.fleet.graph",
    "read_fleet": "kilodelta.fleet.schema",
    "run": "kilodelta.fleet.local",
}

__all__ = ["Fleet", "Plan", "make_plan", "read_fleet", "run"]

__getattr__, __dir__ = lazy(__name__, _WHERE)
