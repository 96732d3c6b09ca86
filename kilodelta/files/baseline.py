"""Check that a model is the base that a delta was made for; if not, say what differs."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import Protocol

from kilodelta.errors import BaseMismatchError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.identity import Identity, fingerprints
from kilodelta.files.model_digest import digest
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
    cached: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> Identity:
    """Return the checkpoint's identity if it is the expected base.

    Args:
        checkpoint: the model that was given.
        base: what the delta's manifest says of its base.
        cached: let remembered digests say so at first. A caller that takes this hint must hash
            what it reads later on.
        threads: cores to hash on; all by default.
        progress: called with how many bytes are hashed.

    Raises:
        BaseMismatchError: it is another model; names the tensors that are changed, extra, missing.
        CheckpointError: the files cannot be read.
    """
    if cached:
        hint = digest(checkpoint, cached=True, threads=threads, progress=progress)
        if hint.root == base.root:
            return hint
    identity = digest(checkpoint, threads=threads, progress=progress)
    if identity.root == base.root:
        return identity
    raise BaseMismatchError(
        f"{checkpoint.path} is not the base of this file\n"
        f"  expected {base.root} ({base.name or 'unnamed'}, {base.tensors} tensors)\n"
        f"  found    {identity.root} ({len(identity.tensors)} tensors)\n"
        f"{explain(identity, base.fingerprints)}",
        fix=f"give the exact revision of {base.name or 'the base'} that the file was made for",
    )


def explain(identity: Identity, expected: bytes) -> str:
    """Say what differs from a base of which the manifest keeps two bytes per tensor.

    Args:
        identity: of the model that was given.
        expected: the fingerprints of the base, as `kilodelta.files.identity.fingerprints` makes
            them; may be empty.

    Returns:
        one line per kind of difference.
    """
    if not expected:
        return "  the file keeps no fingerprints, so it cannot tell which tensors differ"
    given = fingerprints(identity)
    ours = [given[i : i + 2] for i in range(0, len(given), 2)]
    theirs = [expected[i : i + 2] for i in range(0, len(expected), 2)]
    changed, extra, missing = _compare(list(identity.tensors), ours, theirs)
    lines = [_line("changed", changed), _line("extra", extra), _line("missing", missing)]
    return (
        "\n".join(line for line in lines if line)
        or "  fingerprints agree: a tensor differs whose two bytes are the same by chance"
    )


def _compare(
    names: list[str], ours: list[bytes], theirs: list[bytes]
) -> tuple[list[str], list[str], list[str]]:
    """Align two lists by their first bytes, which are of the names.

    Returns:
        names whose tensor changed (the second bytes of an aligned pair differ), names that only we
        have, and places at which the base has tensors that we lack.
    """
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
    shown = ", ".join(f"{name:.200}" for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"  {kind}: {shown}{more}"
