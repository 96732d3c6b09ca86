"""Folders that live as long as the process of the tests, for what is made once and cached."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path


def lasting_folder(name: str) -> Path:
    """Make a temporary folder that is removed when this process ends.

    A function under `functools.cache` has no fixture's folder: it is called by several tests.

    Args:
        name: how the folder's name begins.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
