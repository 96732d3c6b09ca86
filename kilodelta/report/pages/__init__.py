"""Turn what a command prints with `--json` into a page: one file for each command."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kilodelta.report.html import Page
from kilodelta.report.pages.compress import compress_page
from kilodelta.report.pages.demo import demo_page
from kilodelta.report.pages.export import export_page
from kilodelta.report.pages.fleet import fleet_page
from kilodelta.report.pages.parts import Json
from kilodelta.report.pages.verify import verify_page

PAGES: Mapping[str, Callable[[Json], Page]] = {
    "compress": compress_page,
    "verify": verify_page,
    "export": export_page,
    "demo": demo_page,
    "fleet": fleet_page,
}
"""The function that lays out the page of each command's result."""

__all__ = ["PAGES"]
