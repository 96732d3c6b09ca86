"""Keep what TensorRT logs: one logger per process, as TensorRT wants it, that holds the errors."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@functools.cache
def logger(trt: Any) -> Any:
    """Return the process's logger of one flavour; its `errors` is a list that its users empty."""

    class Errors(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip())

    return Errors()


@contextmanager
def clean_stdout() -> Iterator[None]:
    """Send what the compiler below TensorRT prints to the process's stdout to stderr instead.

    stdout carries results.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
