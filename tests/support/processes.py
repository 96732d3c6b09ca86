"""Python in a process that has imported nothing yet, with torch and the runtimes blocked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "0.1.0"

BLOCKED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {'torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt'}:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Refuse())
"""
"""Code that lets every import of torch, transformers, onnx and the runtimes fail."""


def run(code: str) -> str:
    """Run code outside the repository; return its stdout, or fail with its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.parent
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
