"""Asking about packages without trusting them: metadata first, imports only in another process."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a probe printed, line by line, or why it printed nothing."""

    lines: tuple[str, ...] = ()
    error: str = ""


def ask(code: str) -> Answer:
    """Run a line of Python in a process of its own: a package may abort, hang or print there."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(error=str(error))
    if done.returncode < 0:
        return Answer(error=f"its import crashes Python (signal {-done.returncode})")
    if done.returncode > 0:
        return Answer(error=_last_line(done.stderr) or f"exit code {done.returncode}")
    return Answer(lines=tuple(_text(done.stdout).splitlines()))


def version(distribution: str) -> str | None:
    """The installed version of a distribution; "unknown" where its metadata is damaged."""
    try:
        found: str | None = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception:  # damaged metadata raises whatever its parser raises
        return "unknown"
    return found or "unknown"


def distributions(module: str) -> tuple[str, ...]:
    """The distributions that bring a top-level module, each once, sorted."""
    try:
        found = importlib.metadata.packages_distributions().get(module, [])
    except Exception:  # one damaged package anywhere may break the whole listing
        found = [name for name in (module, f"{module}-gpu") if version(name) is not None]
    return tuple(sorted({name.lower().replace("_", "-") for name in found}))


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for, read from its `version.py`; None for a CPU build.

    The wheel's own version does not tell: those on PyPI leave the suffix out.
    """
    try:
        place = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        tree = ast.parse(Path(str(place)).read_text(encoding="utf-8"))
    except Exception:  # as above, and the file may be missing or no Python
        return None
    return _assigned(tree, "cuda")


def _assigned(tree: ast.Module, name: str) -> str | None:
    """The text assigned to a module's variable, with or without a type."""
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        value = getattr(statement, "value", None)
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return str(value.value) if isinstance(value, ast.Constant) and value.value else None
    return None


def _text(raw: bytes) -> str:
    """Decoded, without the colours that some print in."""
    return re.sub(r"\x1b\[[0-9;]*m", "", raw.decode("utf-8", "replace"))


def _last_line(raw: bytes) -> str:
    lines = _text(raw).strip().splitlines()
    return lines[-1] if lines else ""
