"""Recurrent layers: their matrices are targets by default, and learn from inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from kilodelta.compress import Options, compress
from kilodelta.format.file import load
from kilodelta.format.methods import Lora
from kilodelta.models.layers import layer_weights
from tests.models.architectures import modules
from tests.support import pico


@pytest.mark.parametrize("kind", ["bilstm", "gru"])
def test_a_recurrent_layer_is_trained_by_default(kind: str, tmp_path: Path) -> None:
    make = getattr(modules, kind)
    pico.save_module(make, tmp_path / "base")
    pico.tuned(tmp_path / "base", tmp_path / "tuned", size=0.2)
    x = np.random.default_rng(0).normal(size=(12, 6, 9)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    options = Options(
        method=Lora(rank=1), steps=3, batch=4, model=f"tests.models.architectures.modules:{kind}"
    )
    report = compress(
        tmp_path / "base",
        tmp_path / "tuned",
        tmp_path / "a.kd",
        inputs=str(tmp_path / "in.npz"),
        options=options,
    )
    module = make()
    weights = {name for name in module.state_dict() if "weight" in name}
    assert layer_weights(module, {name: name for name in module.state_dict()}) == weights
    assert set(load(tmp_path / "a.kd", base=tmp_path / "base").targets) == weights
    assert all("bias" in change.name for change in report.dropped)
    assert report.before is not None
    assert report.after is not None
    # rank 1 of the change itself is where the training starts
    assert report.after.divergence < report.before.divergence
