"""Keeping other libraries' talk off the terminal: progress bars, logs and warnings that are no
news to the user. Errors still come as exceptions."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Python warnings, torch export logs, and transformers logs and progress bars."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir"):
            stack.enter_context(_level(logging.getLogger(name)))
        stack.enter_context(_transformers())
        yield


@contextmanager
def _level(logger: logging.Logger) -> Iterator[None]:
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _transformers() -> Iterator[None]:
    """Only where transformers is loaded already: it is slow to import."""
    if "transformers" not in sys.modules:
        yield
        return
    from transformers.utils import logging as talk

    level, bars = talk.get_verbosity(), talk.is_progress_bar_enabled()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(level)
        if bars:
            talk.enable_progress_bar()
