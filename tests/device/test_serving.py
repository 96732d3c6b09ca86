"""Computing with a device folder, while others change it, from several threads."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kilodelta.cli import main
from kilodelta.device import Device, apply, run
from kilodelta.errors import FileError, InputError, ProofError
from kilodelta.format.delta import Delta
from tests.doubles import numpy_device
from tests.doubles.numpy_device import BATCH
from tests.support.devices import Bench


def test_an_open_device_sees_the_next_fine_tune_and_requests_of_their_own(bench: Bench) -> None:
    device = Device(bench.device)
    held = device.session()
    apply(bench.device, bench.files["a"])
    assert np.array_equal(device.run(BATCH)["y"], bench.outputs["a"])
    assert np.array_equal(device.run(BATCH, bench.files["b"])["y"], bench.outputs["b"])
    assert np.array_equal(device.run(BATCH, "base")["y"], bench.outputs["base"])
    assert np.array_equal(device.run(BATCH)["y"], bench.outputs["a"])
    assert np.array_equal(held.run(BATCH)["y"], bench.outputs["base"])


def test_a_request_file_that_was_rewritten_is_read_again(bench: Bench) -> None:
    device, file = Device(bench.device), bench.root / "any.kd"
    for name in ("a", "b"):
        file.write_bytes(bench.files[name].read_bytes())
        assert np.array_equal(device.run(BATCH, file)["y"], bench.outputs[name])


def test_a_reader_that_was_too_slow_looks_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(bench.device, bench.files["a"])
    device, real = Device(bench.device), numpy_device.StandIn.open

    def late(self: numpy_device.StandIn, folder: Path | None) -> numpy_device.Linear:
        monkeypatch.setattr(numpy_device.StandIn, "open", real)
        for name in ("b", "a", "b"):
            apply(bench.device, bench.files[name])
        return real(self, folder)

    monkeypatch.setattr(numpy_device.StandIn, "open", late)
    assert np.array_equal(device.run(BATCH)["y"], bench.outputs["b"])


class TestSessions:
    """Threads share a device: what is open is had at once, whatever else is in the making."""

    @pytest.fixture
    def slow(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
        """Let sessions of other files than `a` and `b` wait until they are let go."""
        slow = Slow(monkeypatch)
        yield slow
        slow.go.set()

    def test_an_open_session_does_not_wait_for_one_in_the_making(
        self, bench: Bench, slow: Slow
    ) -> None:
        apply(bench.device, bench.files["a"])
        device = Device(bench.device)
        device.run(BATCH)
        slow.start = True
        with ThreadPoolExecutor(4) as pool:
            made = pool.submit(device.run, BATCH, bench.files["b"])
            assert slow.entered.wait(10)
            served = pool.submit(device.run, BATCH).result(timeout=10)
            base = pool.submit(device.run, BATCH, "base")  # has to be made, beside the slow one
            assert np.array_equal(base.result(timeout=10)["y"], bench.outputs["base"])
            assert not made.done()
            slow.go.set()
            assert np.array_equal(made.result(timeout=10)["y"], bench.outputs["b"])
        assert np.array_equal(served["y"], bench.outputs["a"])

    def test_of_many_that_ask_one_makes_it(self, bench: Bench, slow: Slow) -> None:
        device = Device(bench.device)
        slow.start = True
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(device.session, bench.files["b"]) for _ in range(8)]
            assert slow.entered.wait(10)
            slow.go.set()
            sessions = {id(future.result(timeout=10)) for future in asked}
        assert (len(sessions), slow.count) == (1, 1)

    def test_an_error_reaches_all_who_waited_and_the_next_tries_again(
        self, bench: Bench, slow: Slow
    ) -> None:
        device = Device(bench.device)
        slow.start, slow.error = True, ProofError("not here", fix="elsewhere")
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(device.session, bench.files["b"]) for _ in range(4)]
            assert slow.entered.wait(10)
            slow.go.set()
            for future in asked:
                with pytest.raises(ProofError, match="not here"):
                    future.result(timeout=10)
        slow.error = None
        assert np.array_equal(device.run(BATCH, bench.files["b"])["y"], bench.outputs["b"])

    def test_an_interrupt_ends_its_own_thread_alone(self, bench: Bench, slow: Slow) -> None:
        device = Device(bench.device)
        slow.start, slow.error = True, KeyboardInterrupt()
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(device.session, bench.files["b"])
            assert slow.entered.wait(10)
            second = pool.submit(device.run, BATCH, bench.files["b"])
            while len(device._sessions._futures) != 1:  # the second one waits as well
                time.sleep(0.01)
            time.sleep(0.1)
            slow.once = True
            slow.go.set()
            with pytest.raises(KeyboardInterrupt):
                first.result(timeout=10)
            assert np.array_equal(second.result(timeout=10)["y"], bench.outputs["b"])

    def test_no_more_are_made_at_once_than_are_held(
        self, bench: Bench, slow: Slow, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(numpy_device.StandIn, "held", 1)
        device = Device(bench.device)
        slow.start = True
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(device.session, bench.files[name]) for name in "ab"]
            assert slow.entered.wait(10)
            time.sleep(0.1)
            assert slow.count == 1
            slow.go.set()
            for future in asked:
                future.result(timeout=10)
        assert slow.count == 2
        assert len(device._sessions._futures) == 1

    def test_the_one_not_used_for_longest_gives_way(self, bench: Bench) -> None:
        device = Device(bench.device)
        files = [bench.save(f"s{seed}", seed) for seed in range(10, 15)]
        first = device.session(files[0])
        for file in (*files[1:4], files[0], files[4]):  # four are held
            device.session(file)
        assert device.session(files[0]) is first
        assert device.session(files[1]) is not None
        assert len(device._sessions._futures) == 4

    def test_two_files_that_cannot_be_read_are_not_one(self, bench: Bench) -> None:
        device = Device(bench.device)
        for name in ("x.kd", "y.kd"):
            with pytest.raises(FileError, match=name):
                device.session(bench.root / name)
        (bench.root / "x.kd").write_bytes(bench.files["a"].read_bytes())
        assert np.array_equal(device.run(BATCH, bench.root / "x.kd")["y"], bench.outputs["a"])
        with pytest.raises(FileError, match=r"y\.kd"):
            device.session(bench.root / "y.kd")


class Slow:
    """Makes `StandIn.trial` wait for `go`; then it raises `error`, where there is one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.start, self.once, self.count = False, False, 0
        self.error: BaseException | None = None
        real = numpy_device.StandIn.trial

        def trial(mode: numpy_device.StandIn, delta: Delta) -> numpy_device.Linear:
            if self.start:
                self.count += 1
                self.entered.set()
                assert self.go.wait(20)
            error = self.error
            if self.once:
                self.error = None
            if error is not None:
                raise error
            return real(mode, delta)

        monkeypatch.setattr(numpy_device.StandIn, "trial", trial)


class TestRun:
    """`kilodelta.device.run`: files in, files out."""

    def test_files_in_and_out(self, bench: Bench) -> None:
        np.savez(bench.root / "in.npz", **BATCH)  # type: ignore[arg-type]
        outputs = run(
            bench.device,
            bench.root / "in.npz",
            delta=[bench.files["b"]],
            out=bench.root / "out.npz",
        )
        assert np.array_equal(outputs["y"], bench.outputs["b"])
        assert np.array_equal(np.load(bench.root / "out.npz")["y"], bench.outputs["b"])
        assert np.array_equal(run(bench.device, BATCH)["y"], bench.outputs["base"])

    def test_a_delta_for_each_row_needs_slots(self, bench: Bench) -> None:
        with pytest.raises(InputError, match="computes a batch with one fine-tune"):
            run(bench.device, BATCH, delta=["base", "base", bench.files["a"]])

    @pytest.mark.parametrize(
        ("name", "data", "said"),
        [
            ("texts.txt", b"how do I\n", "holds texts; arrays are wanted"),
            ("texts.jsonl", b'{"text": "how"}\n', "holds texts; arrays are wanted"),
            ("in.npz", b"", "is not an .npz file of plain arrays"),
            ("in.npz", b"\x80\x04]\x94.", "is not an .npz file of plain arrays"),
        ],
    )
    def test_texts_are_no_arrays(self, bench: Bench, name: str, data: bytes, said: str) -> None:
        (bench.root / name).write_bytes(data)
        with pytest.raises(InputError, match=said) as caught:
            run(bench.device, bench.root / name)
        assert "unsafe" not in str(caught.value)
        assert "pickle" not in str(caught.value)

    def test_a_small_file_of_much_is_not_unpacked(self, bench: Bench) -> None:
        place = bench.root / "bomb.npz"
        np.savez_compressed(place, x=np.zeros(100_000_000, np.uint8))
        with pytest.raises(InputError, match="would take 100000000 unpacked"):
            run(bench.device, place)

    def test_a_summary_of_numbers_that_are_none(self, bench: Bench) -> None:
        """Strict JSON has no NaN."""
        np.savez(bench.root / "in.npz", x=np.full((3, 8), np.nan, np.float32))
        arguments = ["run", str(bench.device), "--inputs", str(bench.root / "in.npz"), "--json"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        [described] = json.loads(result.stdout, parse_constant=pytest.fail)["outputs"]
        assert described["mean"] == "nan"
