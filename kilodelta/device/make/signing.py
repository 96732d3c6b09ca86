"""Sign a release: state what the file is, and write the signatures beside it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kilodelta import __version__
from kilodelta.errors import InputError
from kilodelta.export.manifest.artefacts import file_fact
from kilodelta.files import plain, staging
from kilodelta.format.delta import Delta
from kilodelta.trust.envelope import sign, signature_path, write_signature
from kilodelta.trust.model_bundle import bundle_path, model_bundle
from kilodelta.trust.statement import stated, time_of

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Signing:
    """How a release is signed.

    Attributes:
        keys: paths of Ed25519 private keys, at least one.
        task: what the fine-tune is for; devices of another task refuse it.
        kinds: the kinds of device it is for; empty for all.
        not_before: a date or UTC time from which it is valid; now by default.
        not_after: until when; empty for ever.
        model_signing: path of a P-256 private key, for a second signature that `model_signing`
            verifies; None for none.
        password: of encrypted keys, or None.
    """

    keys: Sequence[str | os.PathLike[str]]
    task: str
    kinds: Sequence[str] = ()
    not_before: str = ""
    not_after: str = ""
    model_signing: str | os.PathLike[str] | None = None
    password: bytes | None = None

    def paths(self, place: Path) -> tuple[Path, ...]:
        """Return the signature files of the release at `place`."""
        own = (signature_path(place),)
        return own if self.model_signing is None else (*own, bundle_path(place))


def signing_from(
    sign: Sequence[str | os.PathLike[str]],
    *,
    task: str,
    kinds: Sequence[str],
    not_before: str,
    not_after: str,
    model_signing: str | os.PathLike[str] | None,
    password: bytes | None,
) -> Signing | None:
    """Check what a user asks for, before any work; None where nothing is to be signed.

    Args:
        sign: paths of Ed25519 private keys.
        task, kinds, not_before, not_after, model_signing, password: as in `Signing`.

    Raises:
        InputError: something about a signature without a key, no task, or odd dates.
    """
    given = task or kinds or not_before or not_after or model_signing
    if not sign:
        if given:
            raise InputError(
                "a task, kinds and dates are what a signature states, and there is no key",
                fix="add --sign team.key (kilodelta keygen makes one)",
            )
        return None
    if not task:
        raise InputError("a signed release is for a task", fix="add --task NAME")
    begins = time_of(not_before) if not_before else now()
    ends = time_of(not_after) if not_after else ""
    if ends and ends <= begins:
        raise InputError(
            f"it would expire at {ends}, before it begins at {begins}", fix="--not-after"
        )
    return Signing(
        keys=sign,
        task=task,
        kinds=tuple(kinds),
        not_before=begins,
        not_after=ends,
        model_signing=model_signing,
        password=password,
    )


def now() -> str:
    """Return this moment as a statement's time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def sign_release(place: Path, delta: Delta, version: int, base: Path, signing: Signing) -> None:
    """Sign a release that was written, in files beside it (`Signing.paths`).

    Args:
        place: the `.kd` file.
        delta: what it holds.
        version: its version.
        base: the base model, whose tokenizer is stated where it has one.
        signing: how.

    Raises:
        InputError: a key is of another kind, or a name or version cannot be stated.
        OutputError: a signature cannot be written.
    """
    manifest, grid = delta.manifest, delta.manifest.grid
    statement = stated(
        {
            "file": file_fact(place).sha256,
            "base": manifest.base.root,
            "result": manifest.result,
            "version": version,
            "task": signing.task,
            "kinds": tuple(signing.kinds),
            "not_before": signing.not_before,
            "not_after": signing.not_after,
            "tokenizer": _tokenizer(base),
            "tool": f"kilodelta {__version__}",
            "logical": grid.logical if grid else "",
            "quantisation": ", ".join(grid.kinds) if grid else "",
            "beside": manifest.beside,
        }
    )
    write_signature(place, sign(statement, signing.keys, password=signing.password))
    if signing.model_signing is not None:
        name, key = place.name, signing.model_signing
        data = model_bundle(statement, name, key, password=signing.password)
        staging.write(bundle_path(place), data)


def _tokenizer(base: Path) -> str:
    """Digest of the base's tokenizer; empty where the folder holds none."""
    path = base / TOKENIZER
    if not base.is_dir() or not plain.is_model_file(path):
        return ""
    data = plain.read_model_file(path, plain.INDEX_LIMIT)
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
