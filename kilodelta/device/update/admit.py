"""Decide before anything is built: is a file whole, for this base, of a version to take?"""

from __future__ import annotations

from kilodelta.device.folder.bundle import Bundle
from kilodelta.device.folder.device_folder import DeviceFolder
from kilodelta.device.folder.state import State
from kilodelta.device.golden import golden
from kilodelta.errors import (
    BaseMismatchError,
    DowngradeError,
    FileError,
    ProofError,
    printable,
)
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.files.baseline import explain
from kilodelta.format.delta import Delta

HIGHEST = (1 << 63) - 1
"""The highest version that a file can state."""


def bind(folder: DeviceFolder, delta: Delta) -> Delta:
    """Return the delta, bound to the device's base.

    Raises:
        BaseMismatchError: it was made for another base; names what differs.
        DeviceError: what the folder says of its base is damaged.
        SelfTestError: this machine's kernels are wrong.
    """
    require_good_kernels()
    base, bundle = delta.manifest.base, folder.bundle
    if base.root != bundle.base_root:
        here, there = (printable(name, 80) or "unnamed" for name in (bundle.base_name, base.name))
        raise BaseMismatchError(
            "the device folder does not hold the base of this file\n"
            f"  expected {base.root} ({there}, {base.tensors} tensors)\n"
            f"  found    {bundle.base_root} ({here}, {len(folder.tensors.infos)} tensors)\n"
            f"{explain(folder.tensors.identity, base.fingerprints)}",
            fix="apply it to a device folder that was bundled from its own base",
        )
    return delta.bind_to(folder.tensors.infos)


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


def require_strict(delta: Delta, bundle: Bundle) -> None:
    """See that the file's own probe may fail: its limits are within the bundle's ceiling.

    Raises:
        ProofError: one is above it, such as an infinite one, which every output would meet.
        FileError: the probe is damaged.
    """
    for name, limit in golden.limits_of(delta, bundle.dtype).items():
        loosest = max(limit.relative_l2, limit.relative_max)
        if loosest > bundle.ceiling:
            raise ProofError(
                f"the file's probe lets output {name!r:.80} be off by {loosest:.2g}; this device "
                f"takes limits up to {bundle.ceiling:.2g} in {bundle.dtype}",
                fix="make the probe with kilodelta release; bundle --ceiling allows more",
            )
