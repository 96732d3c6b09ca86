"""A fleet's file, and the folder of results that a run on another machine wrote."""

from __future__ import annotations

import json
from pathlib import Path

from kilodelta.commands.fleet.reporting import _status
from kilodelta.fleet import make_plan, read_fleet, run
from kilodelta.fleet.status import located, remember
from kilodelta.progress import silent
from tests.fuzz.harness import Read, Surface
from tests.fuzz.mutations import bytes_changed, json_changed, lines_changed
from tests.support.processes import GOLDEN

_FLEET = f"""version = 1
[base.mini]
path = {json.dumps(str(GOLDEN / "base.safetensors"))}
[[fine-tunes]]
base = "mini"
deltas = [{json.dumps(str(GOLDEN / "nola-8.kd"))}]
[target.merged]
kind = "merge"
[target.served]
kind = "release"
version = 7
probe = false
resources = {{ sm86 = 1, disk = 0.5 }}
"""


def _results(example: Path, trusted: Path) -> Read:
    """Look at results as `fleet status`, `fleet plan` and `fleet report` do."""
    (example / "fleet.toml").write_text(_FLEET)
    out = example / "out"
    remember(out, example / "fleet.toml")
    run(make_plan(read_fleet(example / "fleet.toml"), out), jobs=1)

    def read(work: Path) -> None:
        for as_json in (True, False):
            page = str(trusted / "page.html")
            _status(str(work / "fleet.toml"), str(work / "out"), page, as_json, silent)()
        located(work / "out", work / "out")

    return read


SURFACES = (
    Surface(
        name="fleet",
        make=_results,
        mutate={"*.toml": (lines_changed, bytes_changed), "*.json": (json_changed,)},
    ),
)
