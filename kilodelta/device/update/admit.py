"""Is this file whole, for this base, and not older than what the device has had?"""

from __future__ import annotations

from kilodelta.device.folder.bundle import Bundle, Tensors
from kilodelta.device.folder.state import State
from kilodelta.errors import BaseMismatchError, DowngradeError, FileError
from kilodelta.exact.selftest import require_good_kernels
from kilodelta.files.baseline import explain
from kilodelta.format.delta import Delta


def bind(bundle: Bundle, tensors: Tensors, delta: Delta) -> Delta:
    """The delta, bound to the device's base.

    Raises:
        BaseMismatchError: it was made for another base; names what differs.
        SelfTestError: this machine's kernels are wrong.
    """
    require_good_kernels()
    base = delta.manifest.base
    if base.root != bundle.root:
        raise BaseMismatchError(
            "the device folder does not hold the base of this file\n"
            f"  expected {base.root} ({base.name or 'unnamed'}, {base.tensors} tensors)\n"
            f"  found    {bundle.root} ({bundle.name or 'unnamed'}, {len(tensors.infos)} tensors)\n"
            f"{explain(tensors.identity, base.fingerprints)}",
            fix="apply it to a device folder that was bundled from its own base",
        )
    return delta.bind_to(tensors.infos)


def version(delta: Delta) -> int:
    """A file's version: `made.version`, a whole number; 0 where it states none.

    Raises:
        FileError: it is something else.
    """
    found = delta.manifest.made.get("version", 0)
    if type(found) is not int or not 0 <= found < 1 << 63:
        raise FileError(
            f"the file's made.version is {found!r:.40}, not a whole number",
            fix="write it with kilodelta release --version N",
        )
    return found


def require_newer(found: int, standing: State) -> None:
    """See that a version is not lower than the highest that was ever served here.

    Raises:
        DowngradeError: it is.
    """
    if found < standing.highest:
        raise DowngradeError(
            f"the file has version {found}; this device has had version {standing.highest}",
            fix="release it with a higher version, or apply it with --allow-downgrade",
        )
