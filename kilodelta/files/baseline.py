"""Is this model the base of that delta? If not, what differs?"""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Protocol

from kilodelta.errors import BaseMismatchError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.identity import Identity, digest, fingerprints
from kilodelta.progress import Progress, silent

SHOWN = 5
"""Names listed of each kind."""


class ExpectedBase(Protocol):
    """What a delta's manifest keeps of the base it was made for."""

    @property
    def name(self) -> str: ...

    @property
    def root(self) -> str: ...

    @property
    def tensors(self) -> int: ...

    @property
    def fingerprints(self) -> bytes: ...


def require_base(
    checkpoint: Checkpoint,
    base: ExpectedBase,
    *,
    cache: bool = True,
    threads: int | None = None,
    progress: Progress = silent,
) -> Identity:
    """Return the checkpoint's identity if it is the expected base.

    Raises:
        BaseMismatchError: it is another model; names the tensors that are changed, extra, missing.
    """
    known = digest(checkpoint, cache=cache, threads=threads, progress=progress)
    if known.root == base.root:
        return known
    raise BaseMismatchError(
        f"{checkpoint.path} is not the base of this file\n"
        f"  expected {base.root} ({base.name or 'unnamed'}, {base.tensors} tensors)\n"
        f"  found    {known.root} ({len(known.tensors)} tensors)\n"
        f"{explain(known, base.fingerprints)}",
        fix=f"give the exact revision of {base.name or 'the base'} that the file was made for",
    )


def explain(known: Identity, expected: bytes) -> str:
    """What differs, by the two bytes a tensor that the manifest keeps; one line a kind."""
    if not expected:
        return "  the file keeps no fingerprints, so it cannot tell which tensors differ"
    names = list(known.tensors)
    found = fingerprints(known)
    ours = [found[i : i + 2] for i in range(0, len(found), 2)]
    theirs = [expected[i : i + 2] for i in range(0, len(expected), 2)]
    changed, extra, missing = _compare(names, ours, theirs)
    lines = [_line("changed", changed), _line("extra", extra), _line("missing", missing)]
    return (
        "\n".join(line for line in lines if line) or "  fingerprints agree: a tensor changed subtly"
    )


def _compare(
    names: list[str], ours: list[bytes], theirs: list[bytes]
) -> tuple[list[str], list[str], list[str]]:
    """Align by the names' bytes; an aligned pair whose content bytes differ has changed."""
    matcher = SequenceMatcher(
        None, [pair[:1] for pair in theirs], [pair[:1] for pair in ours], autojunk=False
    )
    changed: list[str] = []
    extra: list[str] = []
    missing: list[str] = []
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag == "equal":
            changed += [
                names[b]
                for a, b in zip(range(a0, a1), range(b0, b1), strict=True)
                if theirs[a] != ours[b]
            ]
            continue
        extra += names[b0:b1]
        if a1 > a0:
            after = f"after {names[b0 - 1]}" if b0 else "at the front"
            missing.append(f"{a1 - a0} {after}")
    return changed, extra, missing


def _line(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"  {kind}: {shown}{more}"
