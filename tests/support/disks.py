"""Disks with little room."""

from __future__ import annotations

import shutil
from collections import namedtuple
from typing import Any

import pytest

Usage = namedtuple("Usage", "total used free")


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Let every disk have so many bytes free."""

    def usage(place: Any) -> Usage:
        return Usage(total=1 << 40, used=(1 << 40) - free, free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage)
