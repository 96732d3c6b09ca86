"""Collect text that every machine has: the first paragraphs of installed packages' docstrings.

Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from kilodelta.errors import MissingPackageError


def paragraphs(module: str) -> Iterator[str]:
    """Yield the first paragraph of every docstring below a module, in the order of its files.

    Raises:
        MissingPackageError: the module is not installed, or without its sources.
    """
    for path in _sources(module):
        for text in _docstrings(path):
            yield " ".join(text.split("\n\n")[0].split())


def _sources(module: str) -> list[Path]:
    place = _place(module)
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    found = [path for path in files if "tests" not in path.relative_to(place).parts]
    if not found:
        raise MissingPackageError(
            f"the sources of {module} are not installed; the demo reads their docstrings",
            fix="in a clone of kilodelta: pip install '.[demo]'",
        )
    return found


def _place(module: str) -> Path:
    """Find where a module lies: only its top package is looked up, nothing is imported."""
    top, *inner = module.split(".")
    found = importlib.util.find_spec(top)
    if found is None or found.origin is None:
        return Path(module)
    origin = Path(found.origin)
    place = (origin.parent if origin.name == "__init__.py" else origin).joinpath(*inner)
    return place if place.exists() else place.with_name(f"{place.name}.py")


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):  # templates and files for other versions of Python
        return
    for node in _statements(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the tree and all statements below it, in their order.

    `ast.walk` also visits expressions, which takes most of its time.
    """
    yield tree
    for part in ("body", "handlers", "orelse", "finalbody"):
        inner = getattr(tree, part, None)
        for node in inner if isinstance(inner, list) else ():
            yield from _statements(node)
