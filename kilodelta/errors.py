"""Every error a user can meet: what happened, and what to do about it.

Each class has its own exit code, which the command line returns:

===  ==========================  =====================================================
 3   `FileError`                 a `.kd` file breaks the format
 4   `CheckpointError`           a model's files cannot be read
 5   `BaseMismatchError`         the model is not the one the file was made for
 6   `ProofError`                a digest or a parity check does not come out
 7   `MissingPackageError`       an optional package is not installed
 8   `OutputError`               a result cannot be written
 9   `InputError`                an argument, an option or an input is wrong
10   `SelfTestError`             this machine's kernels do not reproduce the golden values
11   `ExportError`               a model cannot be exported or an engine not be built
12   `QualityError`              a result is worse than the caller allowed
13   `DeviceError`               a folder is no device folder, or cannot take this step
14   `LockedError`               another command is changing the device folder: try again
15   `DowngradeError`            a file's version is too old for the device, or too far ahead
16   `SignatureError`            a release is not signed by, or not meant for, who reads it
17   `FleetError`                tasks of a fleet failed; the others are done
===  ==========================  =====================================================

Messages quote names and texts of files that anybody may have written, so `KiloDeltaError` escapes
and cuts them: no message can send a control sequence to a terminal or fill a journal.
"""

from __future__ import annotations

import importlib
import unicodedata
from types import ModuleType
from typing import Any, ClassVar

LONGEST_MESSAGE = 4000
"""Characters of a message; real ones stay below 1000."""


def printable(text: str, limit: int = LONGEST_MESSAGE, *, keep: str = "") -> str:
    r"""Return a text that is safe to print: control characters escaped, its length limited.

    Escaped is all that acts on a terminal, breaks a line or hides other text: control and format
    characters (Unicode Cc and Cf), line separators, lone surrogates and unassigned code points.

    Args:
        text: anything, from a file that nobody vouches for.
        limit: characters of `text` to keep; the number of the others is stated.
        keep: characters to leave as they are, such as a newline.

    Example:
        >>> printable("base\x1b[2J")
        'base\\x1b[2J'
        >>> printable("abcdef", limit=3)
        'abc... (3 more characters)'
    """
    shown = "".join(c if c in keep or _is_plain(c) else _escaped(c) for c in text[:limit])
    rest = len(text) - limit
    return f"{shown}... ({rest} more characters)" if rest > 0 else shown


def _is_plain(character: str) -> bool:
    # `isprintable` is false for spaces other than ASCII's, which do no harm.
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class KiloDeltaError(Exception):
    """What happened, with the tensor's name and both values, and what to do (`fix`)."""

    exit_code: ClassVar[int] = 1
    is_local: bool | None = None
    """Of several processes that share a run, whether this one alone raises it; None where that is
    not settled, as before they have met."""

    def __init__(self, what: str, *, fix: str) -> None:
        self.what = printable(what, keep="\n")
        self.fix = printable(fix, keep="\n")
        super().__init__(self.what)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes; an exception by itself forgets keyword arguments."""
        return _again, (type(self), self.what, self.fix), self.__dict__

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}"


def _again(kind: type[KiloDeltaError], what: str, fix: str) -> KiloDeltaError:
    return kind(what, fix=fix)


class FileError(KiloDeltaError):
    """A `.kd` file breaks a rule of the format."""

    exit_code = 3


class CheckpointError(KiloDeltaError):
    """A model's files are missing, damaged or of an unknown kind."""

    exit_code = 4


class BaseMismatchError(KiloDeltaError):
    """The model given is not the base that the file was made for."""

    exit_code = 5


class ProofError(KiloDeltaError):
    """A result differs from what the file says it must be."""

    exit_code = 6


class MissingPackageError(KiloDeltaError):
    """An optional package is needed and not installed."""

    exit_code = 7


class OutputError(KiloDeltaError):
    """A result cannot be written where it was asked for."""

    exit_code = 8


class InputError(KiloDeltaError):
    """An argument, an option or an input does not make sense."""

    exit_code = 9


class SelfTestError(KiloDeltaError):
    """This machine's kernels do not reproduce the golden values."""

    exit_code = 10


class ExportError(KiloDeltaError):
    """A model cannot be exported, or an engine cannot be built from it."""

    exit_code = 11


class QualityError(KiloDeltaError):
    """A result is worse than the caller allowed."""

    exit_code = 12


class DeviceError(KiloDeltaError):
    """A folder is no device folder, is damaged, or has nothing to go back to."""

    exit_code = 13


class LockedError(KiloDeltaError):
    """Another process is changing the device folder at this moment."""

    exit_code = 14


class DowngradeError(KiloDeltaError):
    """A file's version is lower than the highest the device has had, or too far ahead of it."""

    exit_code = 15


class SignatureError(KiloDeltaError):
    """A release lacks a signature that is asked for, has expired, or is for somebody else."""

    exit_code = 16


class FleetError(KiloDeltaError):
    """Some tasks of a fleet failed; the others are done."""

    exit_code = 17


def is_failure(error: BaseException) -> bool:
    """Tell a failure, of a library's own code as well, from a request to end such as Ctrl-C.

    A panic in Rust code (tokenizers, safetensors) comes as pyo3's `PanicException`, which is no
    `Exception`.

    Example:
        >>> is_failure(KeyError("x")), is_failure(KeyboardInterrupt())
        (True, False)
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def one_line(error: BaseException) -> str:
    """Return an exception as one line of a report: its first non-empty line, or its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def require(package: str, *, extra: str, why: str) -> ModuleType:
    """Import an optional package where it is used.

    Args:
        package: the name to import.
        extra: the extra of `pyproject.toml` that installs it.
        why: what it is needed for, to follow "it is needed to".

    Raises:
        MissingPackageError: names that extra.

    Example:
        >>> require("json", extra="cpu", why="read JSON").__name__
        'json'
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise MissingPackageError(
            f"{package} is not installed; it is needed to {why}",
            fix=f"in a clone of kilodelta: pip install '.[{extra}]'",
        ) from None
