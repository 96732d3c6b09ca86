"""The process that children are forked from: what it loads, and in which order."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kilodelta.fleet.processes import MANY, modules_to_load
from kilodelta.fleet.server import huge_pages, serve
from kilodelta.fleet.server.start import LOST, Server, start_anew
from tests.support.processes import ROOT

KINDS = {"merge"}
SIZE = 0x200000


def test_libraries_load_without_collecting_and_are_kept_afterwards() -> None:
    few, many = modules_to_load(KINDS, MANY - 1), modules_to_load(KINDS, MANY)
    assert few[:2] == ["kilodelta.fleet.server.loading", "kilodelta.fleet.server.lean"]
    assert few[-1] == "kilodelta.fleet.server.warm"
    assert "kilodelta.export.merge.checkpoint" in few[1:-1]
    assert many == [*few, "kilodelta.fleet.server.joined"]


def test_loading_stops_the_collector() -> None:
    code = "import kilodelta.fleet.server.loading, gc; raise SystemExit(gc.isenabled())"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_numba_loads_without_scipy_where_no_child_runs_code_of_the_user() -> None:
    code = (
        "import kilodelta.fleet.server.lean, sys; "
        "lean = 'numba.np.arraymath' in sys.modules and 'scipy.linalg' not in sys.modules; "
        "import scipy.linalg; raise SystemExit(not lean)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert "kilodelta.fleet.server.lean" not in modules_to_load({"merge", "release"}, 2)


SCRIPT = """
import sys, threading
from pathlib import Path
from kilodelta.fleet import child
from kilodelta.fleet.processes import Children
from kilodelta.fleet.task import Task
from tests.doubles import child_work

child.do = child_work.seen
light, heavy = (Task(id=k, kind=k, name=k, place=k, key={}, params={}) for k in ("merge", "bundle"))
with Children([light, heavy], Path("out"), 1) as children:
    found = {children.do(task, threading.Event())["process"] for task in (light, heavy)}
print(len(found))
"""


def test_a_script_that_runs_a_fleet_needs_no_guard(tmp_path: Path) -> None:
    """Children import what they need, and never the script: one is forked, one is started anew."""
    (tmp_path / "script.py").write_text(SCRIPT)
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_a_server_that_is_killed_is_started_again() -> None:
    server = Server(["no.such.module"])
    try:
        pipe, first = server.fork()
        process = server._process
        assert process is not None
        process.kill()
        process.wait()
        pipe.close()
        assert first.exit_code(patient=True) in (0, LOST)  # whether it had been forked or not
        pipe, second = server.fork()
        assert second.exit_code(patient=False) is None
        pipe.close()
        assert second.exit_code(patient=True) == 0
    finally:
        server.close()


def test_a_server_ends_also_where_others_hold_its_socket() -> None:
    """A fork of the process that runs a fleet inherits it, and may live on."""
    server = Server([])
    server.start()
    assert server._control is not None
    process, held = server._process, os.dup(server._control.fileno())
    assert process is not None
    closing = threading.Thread(target=server.close)
    closing.start()
    closing.join(30)
    process.kill()
    os.close(held)
    closing.join()
    assert process.returncode == 0


@pytest.mark.parametrize("start", [start_anew, None])
def test_a_child_ends_when_it_is_told_to(start: Any) -> None:
    server = Server([])
    try:
        pipe, process = (start or server.fork)()
        process.terminate()
        assert process.exit_code(patient=True) == -signal.SIGTERM
        process.terminate()  # of one that has ended nothing is asked
        pipe.close()
    finally:
        server.close()


def test_a_child_collects_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class HungUp:
        def recv(self) -> None:
            raise EOFError

    for name in ("os.dup2", "os.open", "signal.signal", "gc.set_threshold"):
        monkeypatch.setattr(name, lambda *_: None)
    gc.disable()
    try:
        serve._run(HungUp())
        assert gc.isenabled()
    finally:
        gc.enable()


MAPS = """\
00400000-00800000 r--p 00000000 fe:00 3389    /usr/bin/python
00a00000-01200000 rw-p 00000000 fe:00 3389    /usr/bin/python
021ff000-02a01000 rw-p 00000000 00:00 0       [heap]
03000000-03200000 rw-p 00000000 00:00 0
03200000-03400000 rw-s 00000000 00:00 0
03400000-03600000 ---p 00000000 00:00 0
03600000-037ff000 rw-p 00000000 00:00 0
03a00000-03c00000 rw-p 00000000 00:00 0       [stack]
03c00000-03e00000 rw-p 00000000 00:01 77      /memfd:a name (deleted)
"""


def test_only_whole_pages_of_private_memory_are_joined() -> None:
    found = list(huge_pages.private_ranges(MAPS, SIZE))
    assert found == [(0x2200000, 0x800000), (0x3000000, SIZE)]


def test_joined_memory_holds_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rest of this process stays as it is."""
    with mmap.mmap(-1, 4 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = bytes(range(256)) * (len(memory) // 256)
        view = (ctypes.c_char * len(memory)).from_buffer(memory)
        piece = [(-(-ctypes.addressof(view) // SIZE) * SIZE, 3 * SIZE)]
        monkeypatch.setattr(huge_pages, "private_ranges", lambda *_: piece)
        assert huge_pages.join_pages() in (0, 1)  # 0 before Linux 6.1
        assert memory[:] == bytes(range(256)) * (len(memory) // 256)
        del view


def test_a_system_without_huge_pages_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_SIZE", huge_pages._SIZE.with_name("nowhere"))
    assert huge_pages.join_pages() == 0
