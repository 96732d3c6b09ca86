"""Compile kernels with numba, and keep the machine code where this machine lets us.

`@kernel` is `numba.njit` without the interpreter's lock. Compiling takes many seconds, so the code
is kept: in numba's own folder where `NUMBA_CACHE_DIR` names one, beside the sources where they can
be written, else below `$KILODELTA_CACHE`. Where nothing can be written (a read-only container),
each process compiles anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from kilodelta.files import digest_cache
from kilodelta.memory import uncollected

with uncollected():
    import numba
    from numba.core import config
    from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
    from numba.core.runtime import rtsys

SOURCES = Path(__file__).parent

Function = Callable[..., Any]


def kernel(function: Function | None = None, **options: Any) -> Any:
    """Compile a function when it is first called; a decorator, with or without options.

    Args:
        function: what to compile.
        options: further ones of `numba.njit`, such as `fastmath`.

    Example:
        >>> @kernel
        ... def double(x):
        ...     return 2 * x
        >>> double(21)
        42
    """
    if function is None:
        return lambda decorated: kernel(decorated, **options)
    compiled = numba.njit(nogil=True, **options)(function)
    if cache_folder() is not None:
        compiled._cache = _KernelCache(function)  # what `njit(cache=True)` does
    return compiled


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """Return the folder for machine code, or None where there is none."""
    if config.CACHE_DIR:
        return _usable(Path(config.CACHE_DIR) / "kilodelta")
    beside = _usable(SOURCES / "__pycache__" / "numba")
    if beside is not None:
        return beside
    own = digest_cache.folder() / "numba"
    return _usable(own) if _is_private(own) else None


def _usable(folder: Path) -> Path | None:
    """Return the folder, made if needed, if a file can be written there; else None."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return None


def _is_private(folder: Path) -> bool:
    """Check that nobody else can have put code there: what is loaded from it is run."""
    try:
        status = folder.stat()
    except OSError:
        return True  # it is about to be made by us
    owner = getattr(os, "geteuid", lambda: status.st_uid)()
    return status.st_uid == owner and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@lru_cache(maxsize=1)
def source_stamp() -> str:
    """Hash the sources of all kernels: a kernel's code holds copies of those that it calls."""
    state = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.py")):
        source = path.read_bytes()
        if b"import kernel" in source:
            state.update(source)
    return state.hexdigest()


class _Locator(_CacheLocator):  # type: ignore[misc]
    """Where numba looks for a function's code, and how it tells that the code is of this source."""

    def __init__(self, function: Function, path: str) -> None:
        self._line = function.__code__.co_firstlineno
        self._py_file = path

    @classmethod
    def from_function(cls, py_func: Function, py_file: str) -> _Locator:
        return cls(py_func, py_file)

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return source_stamp()

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Impl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _KernelCache(FunctionCache):  # type: ignore[misc]
    """numba's cache of one function; what is damaged in it is compiled again."""

    _impl_class = _Impl

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load a function's code, without all that numba needs to compile another one.

        numba's own way makes everything ready for that first, which takes most of the time of a
        short merge. Code that is loaded needs numba's memory alone; where nothing can be loaded,
        numba makes the rest ready as it compiles.
        """
        try:
            with uncollected():
                rtsys.initialize(target_context)
                return self._load_overload(sig, target_context)
        except Exception:  # unpickling garbage raises anything
            with contextlib.suppress(Exception):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception:  # the disk is full
            return
