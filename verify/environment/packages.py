"""Ask about packages without trusting them: metadata first, imports only in another process."""

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
    """The lines that a probe printed, or the error because of which it printed none."""

    lines: tuple[str, ...] = ()
    error: str = ""


def ask(code: str) -> Answer:
    """Run Python code in a separate process, where a package may abort, hang or print."""
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
    """Return the installed version of a distribution; "unknown" if its metadata is damaged."""
    try:
        installed: str | None = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception:  # damaged metadata raises anything
        return "unknown"
    return installed or "unknown"


def distributions(module: str) -> tuple[str, ...]:
    """Return the distributions that install a top-level module, each once, sorted."""
    try:
        owners = importlib.metadata.packages_distributions().get(module, [])
    except Exception:  # one damaged package anywhere may break the whole listing
        owners = [name for name in (module, f"{module}-gpu") if version(name) is not None]
    return tuple(sorted({name.lower().replace("_", "-") for name in owners}))


def torch_cuda() -> str | None:
    """Return the CUDA version that torch was built for; None for a CPU build.

    It is read from torch's `version.py`: the wheels on PyPI leave the suffix out of their version.
    """
    try:
        place = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        tree = ast.parse(Path(str(place)).read_text(encoding="utf-8"))
    except Exception:  # as above, and the file may be missing or no Python
        return None
    return _assigned(tree, "cuda")


def _assigned(tree: ast.Module, name: str) -> str | None:
    """Return the text assigned to a module's variable, annotated or not."""
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
        value = getattr(statement, "value", None)
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return str(value.value) if isinstance(value, ast.Constant) and value.value else None
    return None


def _text(raw: bytes) -> str:
    """Decode, leaving out terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", raw.decode("utf-8", "replace"))


def _last_line(raw: bytes) -> str:
    lines = _text(raw).strip().splitlines()
    return lines[-1] if lines else ""
