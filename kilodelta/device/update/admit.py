"""Decide before anything is built: is a file whole, for this base, of a version to take?"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.folder.state import State
from kilodelta.device.golden import golden
from kilodelta.device.golden.golden import Golden
from kilodelta.errors import (
    BaseMismatchError,
    DowngradeError,
    FileError,
    ProofError,
    SignatureError,
    printable,
)
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.files.baseline import explain
from kilodelta.format.delta import Delta
from kilodelta.trust.envelope import read_signature, signature_path, verify
from kilodelta.trust.policy import Clock, Pins, require_allowed
from kilodelta.trust.statement import Statement, seconds

HIGHEST = (1 << 63) - 1
"""The highest version that a file can state."""


def bind(folder: DeviceFolder, delta: Delta) -> Delta:
    """Return the delta, bound to the device's base, within its own limit of work or the bundle's.

    Raises:
        BaseMismatchError: it was made for another base; names what differs.
        FileError: it asks for more work than allowed.
        DeviceError: what the folder says of its base is damaged.
        SelfTestError: this machine's kernels are wrong.
    """
    require_good_kernels()
    base, bundle, grid = delta.manifest.base, folder.bundle, delta.manifest.grid
    if folder.outline is not None:
        folder.outline.require(delta.manifest, "the device folder")
    elif grid is not None:  # its updates are exact for codes and steps that this folder lacks
        kinds = ", ".join(grid.kinds)
        raise BaseMismatchError(
            f"the file was made for a quantised base ({kinds}), and this device folder serves a"
            f" float model, in {bundle.mode} mode",
            fix="apply the file for the float model, from which this one was rebased, or bundle the"
            " quantised model: kilodelta bundle BASE -o FOLDER",
        )
    elif base.root != bundle.base_root:
        here, there = (printable(name, 80) or "unnamed" for name in (bundle.base_name, base.name))
        raise BaseMismatchError(
            "the device folder does not hold the base of this file\n"
            f"  expected {base.root} ({there}, {base.tensors} tensors)\n"
            f"  found    {bundle.base_root} ({here}, {len(folder.tensors.infos)} tensors)\n"
            f"{explain(folder.tensors.identity, base.fingerprints)}",
            fix="apply it to a device folder that was bundled from its own base",
        )
    limit = bundle.max_work if delta.max_work is None else delta.max_work
    return replace(delta, max_work=limit).bind_to(folder.changeable)


def version_of(delta: Delta) -> int:
    """Return a file's version: `made.version`, a whole number; 0 where it states none.

    Raises:
        FileError: it is something else.
    """
    version = delta.manifest.made.get("version", 0)
    if type(version) is not int or not 0 <= version <= HIGHEST:
        raise FileError(
            f"the file's made.version is {version!r:.40}, not a whole number",
            fix="write it with kilodelta release --version N",
        )
    return version


def require_version(
    version: int, standing: State, bundle: Bundle, *, allow_downgrade: bool, allow_jump: bool
) -> None:
    """See that a version is neither lower than the highest served here, nor far above it.

    One file of version 2^63 - 1 would otherwise make the device refuse every later release.

    Args:
        version: the file's.
        standing: what is served, and the highest version that was.
        bundle: says how far a version may jump.
        allow_downgrade: take a lower version.
        allow_jump: take one that is far above.

    Raises:
        DowngradeError: it is lower, or too far above.
    """
    if version < standing.highest and not allow_downgrade:
        raise DowngradeError(
            f"the file has version {version}; this device has had version {standing.highest}",
            fix="release it with a higher version, or apply it with --allow-downgrade",
        )
    most = standing.highest + bundle.max_jump
    if version > most and not allow_jump:
        raise DowngradeError(
            f"the file has version {version}; this device has had version {standing.highest} and "
            f"takes none above {most}",
            fix=f"release it with version {standing.highest + 1}, or apply it with --allow-jump, "
            "after which lower versions are refused",
        )


@dataclass(frozen=True, kw_only=True)
class Signed:
    """Who signed a release, and what its signature makes certain.

    Attributes:
        keys: ids of the pinned keys that signed it; empty on a device without pinned keys.
        seen: seconds since 1970 UTC that have passed, as the statement says; 0 without one.
        note: what is odd about this device's clock; empty if nothing is.
    """

    keys: tuple[str, ...] = ()
    seen: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Statements:
    """A file's verified statement, to be held against what is read of the file afterwards."""

    statement: Statement
    pins: Pins
    clock: Clock
    keys: tuple[str, ...]


def verified(folder: DeviceFolder, file: Path, standing: State) -> Statements | None:
    """Verify the signature beside a file, before a byte of the file itself is parsed.

    Returns:
        what enough pinned keys have signed; None on a device that pins none.

    Raises:
        FileError: there is no such file.
        SignatureError: it is missing, damaged, or by too few of the keys.
        DeviceError: `trust.json` is damaged.
        MissingPackageError: `securesystemslib` is not installed.
    """
    pins = folder.pins
    if pins is None:
        return None
    if not os.path.lexists(file):
        raise FileError(f"{file} cannot be opened: No such file or directory", fix="check the path")
    data = read_signature(file)
    if data is None:
        raise SignatureError(
            f"{file} is not signed: {signature_path(file).name} is not beside it, and this device "
            "takes signed releases only",
            fix="fetch the .sig of this release, or sign it: kilodelta release --sign team.key",
        )
    statement, keys = verify(data, pins.keys, pins.threshold)
    clock = Clock.floored(standing.seen)
    return Statements(statement=statement, pins=pins, clock=clock, keys=tuple(keys))


def require_covered(
    statements: Statements | None, delta: Delta, digest: str, version: int
) -> Signed:
    """See that the verified statement is of this very file, and that the device's pins let it pass.

    Args:
        statements: from `verified`.
        delta: the file as it was read.
        digest: of all its bytes, taken before it was read.
        version: the file's.

    Raises:
        SignatureError: it is another file's, or for another task or kind, or has expired.
    """
    if statements is None:
        return Signed()
    require_allowed(
        statements.statement,
        statements.pins,
        clock=statements.clock,
        base=delta.manifest.base.root,
        file=digest,
        result=delta.manifest.result,
        version=version,
    )
    begins = statements.statement.not_before
    seen = seconds(begins) if begins else 0
    return Signed(keys=statements.keys, seen=seen, note=statements.clock.note)


def require_modest_probe(delta: Delta, own: Golden, way: str = golden.MERGED) -> None:
    """See that the file's own probe does not take far longer to compute than the bundle's.

    Args:
        delta: the file.
        own: the bundle's golden values.
        way: how the bundle applies the file.

    Raises:
        ProofError: it does.
        FileError: the probe is damaged.
    """
    given = golden.of_delta(delta, way)
    most = max(golden.FREE, golden.TIMES * golden.size_of(own.inputs))
    if given is not None and golden.size_of(given.inputs) > most:
        shapes = ", ".join(f"{n!r:.40} {a.shape}" for n, a in given.inputs.items())
        raise ProofError(
            f"the file's probe has inputs {shapes:.200}, which ask for far more than the bundle's"
            " own golden inputs",
            fix="release it with fewer --rows, or with shorter inputs",
        )


def require_strict(delta: Delta, bundle: Bundle) -> None:
    """See that the file's own probe may fail: its limits are within the bundle's ceiling.

    Raises:
        ProofError: one is above it, such as an infinite one, which every output would meet.
        FileError: the probe is damaged.
    """
    way = golden.way_of(delta, bundle.mode)
    for name, limit in golden.limits_of(delta, bundle.dtype, way).items():
        loosest = max(limit.relative_l2, limit.relative_max)
        if loosest > bundle.ceiling:
            raise ProofError(
                f"the file's probe lets output {name!r:.80} be off by {loosest:.2g}; this device "
                f"takes limits up to {bundle.ceiling:.2g} in {bundle.dtype}",
                fix="make the probe with kilodelta release; bundle --ceiling allows more",
            )
