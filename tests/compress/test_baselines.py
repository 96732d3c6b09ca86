"""The picture of a report: what SVDs of about the same bytes keep, measured as the file is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import torch
from safetensors.torch import load_file, save_file

from kilodelta.compress import Options, compress
from kilodelta.compress.distill.baselines import LORA, SVD, affordable, ranks
from kilodelta.compress.distill.options import check, options_from
from kilodelta.errors import InputError
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Target
from kilodelta.report.pages.compress import compress_page
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


def test_a_lora_of_the_same_bytes_is_trained_beside_the_file_where_it_is_asked_for(
    tmp_path: Path,
) -> None:
    base = pico.bert(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.05)
    (tmp_path / "texts.txt").write_text("\n".join(pico.TEXTS * 8))
    options = options_from(  # so few that rank 1 of all 13 tensors costs more
        method="unilora", bases=200, steps=20, batch=8, baselines="svd,lora"
    )
    out = tmp_path / "task.kd"
    report = compress(base, tuned, out, inputs=tmp_path / "texts.txt", options=options)
    plain = replace(options, baselines=())
    compress(base, tuned, tmp_path / "b.kd", inputs=tmp_path / "texts.txt", options=plain)
    assert (tmp_path / "b.kd").read_bytes() == out.read_bytes()  # the file is not changed by it
    (lora,) = (size for size in report.sizes if size.name == LORA)
    own = report.sizes[0]
    assert own.nbytes - 40 < lora.nbytes <= own.nbytes
    assert re.fullmatch(r"rank 1 of [1-9] of 13 tensors", lora.how)
    # Training is what it has over the truncated SVD of more bytes.
    (svd, *_) = (size for size in report.sizes if size.name == SVD)
    assert lora.agreement >= svd.agreement
    page = compress_page(report.to_json()).html()
    assert lora.how in page
    assert "starts from the SVD" in page


def test_a_lora_is_its_own_baseline(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned")
    (tmp_path / "texts.txt").write_text("\n".join(pico.TEXTS * 8))
    options = Options(method=Lora(rank=1), steps=2, batch=8, baselines=("lora",))
    out, inputs = tmp_path / "task.kd", tmp_path / "texts.txt"
    assert len(compress(base, tuned, out, inputs=inputs, options=options).sizes) == 1


@pytest.mark.parametrize(
    ("nbytes", "rank", "names"),
    [(400, 4, "ab"), (197, 1, "ab"), (98, 1, "b"), (50, 1, "b"), (49, 1, "a"), (9, 0, "")],
)
def test_bytes_buy_a_rank_or_else_tensors(nbytes: int, rank: int, names: str) -> None:
    """Rank 1 costs 25 bytes for each half of a: 20 + 40 rows; b has the larger change."""
    shapes = (
        {"a": (60, 40), "b": (60, 40)} if nbytes not in (50, 49) else {"a": (38, 60), "b": (60, 40)}
    )
    targets = [
        Target(name=name, dtype="F32", shape=shape, transposed=False, index=index)
        for index, (name, shape) in enumerate(shapes.items())
    ]
    bought = affordable(targets, {"a": 1.0, "b": 2.0}, nbytes, 4)
    if not rank:
        assert bought is None
        return
    assert bought is not None
    assert (bought[0].rank, "".join(target.name for target in bought[1])) == (rank, names)


def test_a_baseline_that_nobody_has_is_refused() -> None:
    with pytest.raises(InputError, match="'dora' is no baseline"):
        check(options_from(baselines="svd,dora"), learns=True)
    with pytest.raises(InputError, match="without inputs"):
        check(options_from(method="lora", baselines="svd"), learns=False)
    assert options_from(baselines="none").baselines == ()
    assert options_from(baselines="lora,svd").baselines == ("lora", "svd")
