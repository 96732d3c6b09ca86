"""The modes of a device folder: what each needs, builds and opens."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kilodelta.device import apply, status
from kilodelta.device.folder import DeviceFolder, state
from kilodelta.device.modes import refit, runtime
from kilodelta.device.update.admit import bind
from kilodelta.errors import (
    BaseMismatchError,
    DeviceError,
    MissingPackageError,
)
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.format.manifest import Grid
from tests.support.devices import Bench


def test_a_runtime_that_is_missing_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    bench.change_bundle(lambda table: table.update(mode="refit", runtime="tensorrt"))
    with pytest.raises(MissingPackageError, match="tensorrt is not installed"):
        apply(bench.device, bench.files["a"])
    assert status(bench.device).state == state.State()


class Engine:
    """A double of the refit engine: it notes what it is given, and saves what it took."""

    def __init__(self, path: Path, base: Path, *, flavour: str, unused: Any) -> None:
        self.given = (path.name, base.name, flavour, unused)

    def refit(self, found: Delta) -> None:
        self.result = found.manifest.result

    def save(self, path: Path) -> None:
        path.write_text(f"{self.given} {self.result}")


def test_refit_mode_saves_the_refitted_engine_beside_the_base(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "RefitEngine", Engine)
    monkeypatch.setattr(runtime, "version", lambda bundle: "double 1")
    opened = lambda bundle, folder: (folder / "model.engine").read_text()  # noqa: E731
    monkeypatch.setattr(runtime, "open_runner", opened)
    folder = DeviceFolder.open(bench.device)
    refit.write_unused(folder.base, ["pooler.weight"])
    mode = refit.RefitMode(replace(folder, bundle=replace(folder.bundle, runtime="tensorrt")))
    found = load(bench.files["a"], bench.base)
    mode.build(found, tmp_path)
    given = ("model.engine", "weights.safetensors", "tensorrt", ("pooler.weight",))
    assert str(mode.open(tmp_path)) == str(mode.trial(found)) == f"{given} {found.manifest.result}"
    (folder.base / "refit.json").write_text("[]")
    with pytest.raises(DeviceError, match="refit is not an object"):
        mode.build(found, tmp_path)


@pytest.mark.parametrize("mode", ["adapter", "patch", "refit"])
def test_a_file_for_a_quantised_base_is_refused_by_what_it_is(bench: Bench, mode: str) -> None:
    digest = "sha256:" + "0" * 64
    grid = Grid(
        logical=digest, grids=digest, plain=digest, config=digest, weights=1, kinds=("int4 1x32",)
    )
    folder = DeviceFolder.open(bench.device)
    folder = replace(folder, bundle=replace(folder.bundle, mode=mode))
    delta = load(bench.files["a"])
    delta = replace(delta, manifest=replace(delta.manifest, grid=grid, beside=digest))
    with pytest.raises(BaseMismatchError, match=f"int4 1x32.*float model, in {mode} mode"):
        bind(folder, delta)
