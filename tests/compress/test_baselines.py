"""The picture of a report: what SVDs of about the same bytes keep, measured as the file is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import torch
from safetensors.torch import load_file, save_file

from kilodelta.compress import Options, compress
from kilodelta.compress.distill.baselines import ranks
from kilodelta.format.targets import Target
from tests.support import pico


def test_a_report_shows_the_file_beside_svds(tmp_path: Path) -> None:
    """A change of rank 1 is what an SVD of rank 1 keeps whole but for 4 bits of its factors."""
    base = pico.bert(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.0)
    tensors = load_file(tuned / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if name.startswith("encoder") and tensor.ndim == 2:
            left, right = (torch.randn(n, 1, generator=generator) for n in tensor.shape)
            tensor += 0.1 * left @ right.T
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    (tmp_path / "texts.txt").write_text("\n".join(pico.TEXTS * 8))
    options = Options(method="nola", budget=3000, steps=4, batch=8)
    out, page = tmp_path / "task.kd", tmp_path / "page.html"
    given = {"inputs": tmp_path / "texts.txt", "options": options}
    report = compress(base, tuned, out, report=page, **given)  # type: ignore[arg-type]
    own, *svds = report.sizes
    assert report.after is not None
    assert report.before is not None
    assert (own.nbytes, own.agreement) == (out.stat().st_size, report.after.agreement)
    assert len(svds) == len({svd.nbytes for svd in svds}) > 1
    assert all(svd.agreement > 0.99 > report.before.agreement for svd in svds)
    assert "Size against fidelity" in page.read_text()
    assert len(json.loads(page.with_suffix(".json").read_text())["sizes"]) == len(report.sizes)
    # Without a page there is nothing to draw, and no time is spent on it; the file is the same.
    assert compress(base, tuned, tmp_path / "b.kd", **given).sizes == ()  # type: ignore[arg-type]
    assert (tmp_path / "b.kd").read_bytes() == out.read_bytes()


def test_ranks_stay_between_one_and_full() -> None:
    target = Target(name="w", dtype="F32", shape=(60, 40), transposed=False, index=0)
    assert ranks([target], 200) == (4, 16, 40)
    assert ranks([target], 1) == (1,)
    assert ranks([target], 10**6) == (40,)
