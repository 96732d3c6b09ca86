"""Computing with a device folder, while others change it, from several threads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kilodelta.device import Device, apply
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
