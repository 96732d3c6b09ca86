"""A pytest plugin that removes one guard of docs/security.md, so that its test has to fail.

``KILODELTA_UNGUARDED=NODE_ID python -m pytest -p tests.support.unguarded NODE_ID`` exits 1 if the
test named is worth its place in the table; ``python -m tests.support.unguarded`` does so for all.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

VARIABLE = "KILODELTA_UNGUARDED"


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _true(*_: Any, **__: Any) -> bool:
    return True


def _false(*_: Any, **__: Any) -> bool:
    return False


def _same(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _no_pins(real: Any) -> Any:
    """A device whose `trust.json` is passed over where it is damaged."""

    def pins(folder: Any) -> Any:
        try:
            return real.fget(folder)
        except Exception:
            return None

    return property(pins)


def _forgetful(real: Any) -> Any:
    """A client that forgets what it has seen."""
    import contextlib
    import shutil

    @contextlib.contextmanager
    def locked(place: Any) -> Any:
        shutil.rmtree(place / "metadata", ignore_errors=True)
        with real(place):
            yield

    return locked


def _unsigned(real: Any) -> Any:
    """The payload of an envelope, whoever signed it."""

    def checked(data: bytes, payload_type: str, keys: Any, threshold: int) -> Any:
        return real(data, payload_type, keys, 0)

    return checked


def _now(real: Any) -> Any:
    """A clock that does not know what has been seen."""
    return classmethod(lambda cls, floor, system=None: real.__func__(cls, 0, system))


def _following(real: Any) -> Any:
    """Open what a name leads to, whatever that is."""

    def open_file(path: Any, flags: int = os.O_RDONLY, *, follow: bool = False) -> int:
        return os.open(path, flags | os.O_NONBLOCK, 0o644)

    return open_file


def _as(value: Any) -> Callable[[Any], Any]:
    return lambda real: value


Guard = tuple[str, Callable[[Any], Any]]
"""`module:attribute`, and what makes its harmless replacement of the real one."""

_SIGNED, _TRUST = "tests/device/test_signed.py::", "tests/trust/test_trust.py::"
_MIRROR, _WORK = "tests/trust/test_mirror.py::", "tests/device/test_work.py::"
_MEDIA = "tests/models/test_media.py::"
_ADMIT, _ENVELOPE = "kilodelta.device.update.admit", "kilodelta.trust.envelope"
_TUF = "tuf.api._payload"
GUARDS: Mapping[str, tuple[Guard, ...]] = {
    _SIGNED + "test_nothing_of_an_unsigned_file_is_parsed": (
        (f"{_ADMIT}:verified", _as(_nothing)),
    ),
    _SIGNED + "test_anything_else_is_refused_and_nothing_changes": (
        (f"{_ADMIT}:require_allowed", _as(_nothing)),
    ),
    _SIGNED + "test_a_signature_is_of_one_file": ((f"{_ADMIT}:require_allowed", _as(_nothing)),),
    _SIGNED + "test_a_release_never_stands_unsigned": (
        ("kilodelta.device.make.signing:Signing.paths", _as(lambda self, place: ())),
    ),
    _SIGNED + "test_a_version_far_too_high_is_taken_back_by_a_signature": (
        (f"{_ADMIT}:require_version", _as(_nothing)),
    ),
    _SIGNED + "test_keys_change_by_a_pinned_key_alone": (
        ("kilodelta.trust.rotation:checked_payload", _unsigned),
    ),
    _SIGNED + "test_a_change_travels_as_a_file_and_is_good_once": (
        ("kilodelta.trust.rotation:pins_digest", _as(lambda pins: "sha256:" + "0" * 64)),
    ),
    _SIGNED + "test_expiry_is_judged_by_the_latest_time_that_is_certain": (
        ("kilodelta.trust.policy:Clock.floored", _now),
    ),
    _SIGNED + "test_a_damaged_trust_file_lets_nothing_pass": (
        ("kilodelta.device.folder.device_folder:DeviceFolder.pins", _no_pins),
    ),
    _TRUST + "test_every_flipped_bit_of_payload_or_signature_is_noticed": (
        (f"{_ENVELOPE}:_has_signed", _as(_true)),
    ),
    _TRUST + "test_k_of_n_keys_must_have_signed": ((f"{_ENVELOPE}:_has_signed", _as(_true)),),
    _TRUST + "test_what_the_pins_do_not_cover_is_named": (
        ("kilodelta.trust.policy:require_allowed", _as(_nothing)),
    ),
    _MIRROR + "test_a_rollback_is_refused": (("kilodelta.trust.tuf_client:_locked", _forgetful),),
    _MIRROR + "test_a_frozen_mirror_is_refused": ((f"{_TUF}:Signed.is_expired", _as(_false)),),
    _MIRROR + "test_a_clock_that_stands_still_does_not_help_a_frozen_mirror": (
        ("kilodelta.trust.tuf_client:_require_fresh", _as(_nothing)),
    ),
    _MIRROR + "test_other_bytes_and_mixtures_are_refused": (
        (f"{_TUF}:BaseFile._verify_hashes", _as(staticmethod(_nothing))),
        (f"{_TUF}:BaseFile._verify_length", _as(staticmethod(_nothing))),
    ),
    _MIRROR + "test_a_clients_folder_of_a_stranger_leads_nowhere": (
        ("kilodelta.trust.tuf_client:_require_plain", _as(_nothing)),
    ),
    _MIRROR + "test_the_name_of_a_target_leads_nowhere": (
        ("kilodelta.trust.tuf_client:is_file_name", _as(_true)),
    ),
    _WORK + "test_the_bundle_limits_the_work_before_it_is_begun": (
        ("kilodelta.format.cost:check", _as(_nothing)),
    ),
    _WORK + "test_a_probe_may_not_take_far_longer_than_the_bundle_own": (
        (f"{_ADMIT}:require_modest_probe", _as(_nothing)),
    ),
    "tests/device/test_apply.py::TestCeilings::test_a_limit_above_the_ceiling_is_refused": (
        (f"{_ADMIT}:require_strict", _as(_nothing)),
    ),
    "tests/device/test_folder.py::TestFolderOfAStranger::test_a_link_leads_nowhere": (
        ("kilodelta.files.plain:open_file", _following),
        ("kilodelta.files.plain:is_folder", _as(os.path.isdir)),
        ("kilodelta.device.folder.device_folder:_require_plain", _as(_nothing)),
    ),
    "tests/fuzz/test_fuzz.py::test_no_damaged_file_gives_a_traceback[bundle]": (
        ("kilodelta.files.untrusted:mapping", _as(_same)),
        ("kilodelta.files.untrusted:text", _as(_same)),
        ("kilodelta.files.untrusted:whole", _as(_same)),
    ),
    "tests/export/test_merge_killed.py::test_what_a_killed_merge_leaves_goes_with_the_next": (
        ("kilodelta.files.staging.stage:sweep", _as(lambda folder: [])),
        ("kilodelta.files.staging.stage:_remove_if_dead", _as(_false)),
    ),
    "tests/export/test_merge_changing.py::test_a_tensor_that_changes_after_the_proof": (
        ("kilodelta.export.merge.streaming:MergeStream._require_known", _as(_nothing)),
        ("kilodelta.export.merge.streaming:MergeStream._require_unchanged", _as(_nothing)),
    ),
    "tests/files/test_digest_cache.py::test_a_cache_that_others_can_write_is_not_read": (
        ("kilodelta.files.digest_cache:_is_private", _as(_true)),
    ),
    "tests/models/test_folders.py::test_python_code_of_a_folder_is_neither_run_nor_offered": (
        ("kilodelta.models.configuration:_require_no_code", _as(_nothing)),
    ),
    _MIRROR + "test_a_repository_of_a_stranger_leads_nowhere": (
        ("kilodelta.trust.tuf_repository:_require_plain", _as(_nothing)),
    ),
    "tests/models/test_folders.py::test_a_configuration_far_larger_than_its_weights_is_refused": (
        ("kilodelta.models.huggingface:check_modules", _as(_nothing)),
        ("kilodelta.models.huggingface:check_parameters", _as(_nothing)),
    ),
    _MEDIA + "test_a_processor_that_asks_for_too_much": (
        ("kilodelta.models.media.batches:check_processor_limits", _as(_nothing)),
    ),
    _MEDIA + "test_a_small_file_of_a_long_sound": (
        ("kilodelta.models.media.sounds:_require_short", _as(_nothing)),
    ),
    _MEDIA + "test_no_program_is_started_for_an_image": (
        ("kilodelta.models.media.images:FORMATS", _as(None)),
    ),
    "tests/fleet/test_schema.py::test_an_input_that_is_a_pipe_is_refused": (
        ("kilodelta.files.plain:open_file", _following),
    ),
    "tests/report/test_report.py::test_texts_of_a_result_stay_texts": (
        ("kilodelta.report.html:escape", _as(_same)),
        ("kilodelta.report.plots:escape", _as(_same)),
    ),
}
"""By the test's node id: its guards, all removed together."""


def pytest_configure(config: Any) -> None:
    """Remove the guards of the test that the environment names."""
    for where, replaced in GUARDS.get(os.environ.get(VARIABLE, ""), ()):
        module, _, path = where.partition(":")
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        real = vars(owner).get(name)
        if real is not None:
            setattr(owner, name, replaced(real))


def main() -> int:
    """Run every test without its guard, each in a fork of one warm process; 1 if any passes."""
    import sys

    import pytest

    for package in ("numba", "kilodelta.device.serving", "kilodelta.export.merge.checkpoint"):
        importlib.import_module(package)
    green = 0
    for node in GUARDS:
        child = os.fork()
        if child == 0:
            os.environ[VARIABLE] = node
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the fork ends)
            arguments = [
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "-p",
                "tests.support.unguarded",
                node,
            ]
            os._exit(int(pytest.main(arguments)))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        green += code != 1
        ends = "fails" if code == 1 else f"ENDS WITH {code}"
        print(f"{ends} without its guard: {node}", flush=True)
    return int(green > 0)


if __name__ == "__main__":
    raise SystemExit(main())
