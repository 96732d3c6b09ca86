"""What a signature states of a release: canonical JSON whose numbers are written as text.

Numbers are text because readers of JSON disagree about large ones: the in-toto package, which
`model_signing` reads with, turns every number into a double.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import Any

from kilodelta.errors import InputError
from kilodelta.files import canonical, untrusted

KIND = "kilodelta-release-1"
"""The statement's own kind and version; another one is refused, never guessed at."""
MAX_VERSION = (1 << 53) - 1
"""Versions end where a double stops being exact, so that any tool reads them alike."""
MAX_KINDS = 64
MAX_GRIDS = 256
LATER = ("logical", "quantisation", "beside")
"""Fields that came after 0.2.0, which knows no quantised bases."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\Z")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_GRIDS = re.compile(r"[a-z0-9]{1,16} [1-9][0-9]{0,9}x[1-9][0-9]{0,9}\Z")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One release: the file by its digest, and what a device may do with it.

    Digests are `sha256:` and 64 hexadecimal digits, times `YYYY-MM-DDTHH:MM:SSZ` in UTC.
    """

    file: str
    """SHA-256 of all bytes of the `.kd` file."""

    base: str
    """Root of the base model."""

    result: str
    """Root of the merged targets that the file promises."""

    version: int
    task: str
    """Which task the fine-tune is for; a device takes one task only."""

    kinds: tuple[str, ...] = ()
    """The kinds of device that may take it; empty for every kind."""

    not_before: str = ""
    not_after: str = ""
    tokenizer: str = ""
    """Digest of the tokenizer that the task's texts are read with, or empty."""

    tool: str = ""

    logical: str = ""
    """Root of a quantised base that all layouts of its codes share; empty for any other base."""

    quantisation: str = ""
    """Kinds of codes and blocks of a quantised base, such as `int4 1x32`, parted by commas."""

    beside: str = ""
    """Root of the updates that the file promises beside a quantised base's codes."""

    def payload(self) -> bytes:
        """Return the bytes that are signed."""
        facts: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        # Devices of 0.2.0 refuse keys that they do not know, so empty ones are left out.
        facts = {key: value for key, value in facts.items() if value or key not in LATER}
        facts |= {"kind": KIND, "version": str(self.version), "kinds": list(self.kinds)}
        return canonical.dumps(facts).encode("utf-8")


def parse(data: bytes) -> Statement:
    """Read a statement from the bytes whose signature was verified.

    Raises:
        FieldError: the bytes are not a statement of this kind in its one spelling.
    """
    try:
        facts = untrusted.mapping(canonical.loads(data), "statement")
    except ValueError as error:
        raise untrusted.FieldError(f"the statement is not canonical JSON: {error}") from None
    if facts.get("kind") != KIND:
        raise untrusted.FieldError(f"the statement's kind is {facts.get('kind')!r:.80}, not {KIND}")
    required = [f.name for f in fields(Statement) if f.name not in LATER]
    table = untrusted.table(facts, "statement", ("kind", *required), LATER)
    statement = Statement(
        file=untrusted.digest(table["file"], "file"),
        base=untrusted.digest(table["base"], "base"),
        result=untrusted.digest(table["result"], "result"),
        version=_version(table["version"]),
        task=_name(table["task"], "task"),
        kinds=untrusted.listed(table["kinds"], "kinds", _name),
        not_before=_time(table["not_before"], "not_before"),
        not_after=_time(table["not_after"], "not_after"),
        tokenizer=_digest_or_none(table["tokenizer"], "tokenizer"),
        tool=untrusted.text(table["tool"], "tool"),
        logical=_digest_or_none(table.get("logical", ""), "logical"),
        quantisation=_grids(table.get("quantisation", ""), "quantisation"),
        beside=_digest_or_none(table.get("beside", ""), "beside"),
    )
    if len(statement.kinds) > MAX_KINDS:
        raise untrusted.FieldError(f"kinds has more than {MAX_KINDS} entries")
    if statement.payload() != data:
        raise untrusted.FieldError("the statement is not in its one spelling")
    return statement


def stated(facts: Mapping[str, Any]) -> Statement:
    """Make a statement of what a user gave, and check it by reading it back.

    Raises:
        InputError: a task, kind, version or date is not as a statement needs it.
    """
    statement = Statement(**facts)
    try:
        return parse(statement.payload())
    except untrusted.FieldError as error:
        raise InputError(
            f"the release cannot be stated: {error}",
            fix="names: letters, digits, '.', '_', '-'; dates: 2027-03-01; versions from 1 on",
        ) from None


def time_of(text: str) -> str:
    """Return a typed date or time as a statement's UTC time; a date stands for its first second.

    Raises:
        InputError: it is neither `2027-03-01` nor `2027-03-01T12:00:00Z`.

    Example:
        >>> from kilodelta.trust.statement import time_of
        >>> time_of("2027-03-01")
        '2027-03-01T00:00:00Z'
    """
    whole = text if "T" in text else f"{text}T00:00:00Z"
    try:
        return _time(whole, "date")
    except untrusted.FieldError:
        raise InputError(
            f"{text!r:.60} is no date", fix="write 2027-03-01 or 2027-03-01T12:00:00Z (UTC)"
        ) from None


def seconds(text: str) -> int:
    """Return a statement's time as seconds since 1970-01-01 UTC."""
    parsed = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    return int(parsed.timestamp())


def _version(value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"[1-9][0-9]{0,15}", value):
        raise untrusted.FieldError(f"version is {value!r:.40}, not a whole number as text")
    if int(value) > MAX_VERSION:
        raise untrusted.FieldError(f"version {value} is above {MAX_VERSION}")
    return int(value)


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.match(value):
        raise untrusted.FieldError(f"{where} is {value!r:.80}, not a name of at most 64 characters")
    return value


def _grids(value: Any, where: str) -> str:
    kinds = value.split(", ") if isinstance(value, str) and value else [] if value == "" else [""]
    if len(kinds) > MAX_GRIDS or not all(_GRIDS.match(kind) for kind in kinds):
        raise untrusted.FieldError(f"{where} is {value!r:.80}, no list of codes and blocks")
    return str(value)


def _time(value: Any, where: str) -> str:
    if value == "":
        return ""
    if not isinstance(value, str) or not _TIME.match(value):
        raise untrusted.FieldError(f"{where} is {value!r:.40}, not YYYY-MM-DDTHH:MM:SSZ")
    try:
        seconds(value)
    except ValueError:
        raise untrusted.FieldError(f"{where} is {value!r:.40}, which is no day") from None
    return value


def _digest_or_none(value: Any, where: str) -> str:
    return "" if value == "" else untrusted.digest(value, where)
