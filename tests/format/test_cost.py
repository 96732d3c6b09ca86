"""A small file cannot ask for hours: the work is estimated before it is done."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kilodelta
from kilodelta.errors import FileError
from kilodelta.format import cost
from kilodelta.format.foreign import OfficialNola, PeftRandLora, PeftUniLora, PeftVera
from kilodelta.format.form import Form
from kilodelta.format.methods import Lora, Nola, RandLora, UniLora, Vera
from kilodelta.format.targets import Patterns, Target
from tests.support import making

PRINT = "sha256:" + "0" * 64


def square(width: int, count: int = 1) -> list[Target]:
    return [
        Target(name=f"{i}", dtype="F32", shape=(width, width), transposed=False, index=i)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("method", "draws", "products"),
    [
        (Nola(rank=8, bases=300), 8 * (64 + 32) * 3, 64 * 32 * 8),
        (Lora(rank=3), 0, 64 * 32 * 3),
        (Vera(rank=7), 7 * (64 + 32), 64 * 32 * 7),
        (UniLora(rank=2), 2 * (64 + 32), 64 * 32 * 2),
        (UniLora(rank=2, anchor=1), 2 * (64 + 32 + 32), 64 * 32 * 2),
        # n = 4 products of rank 10 for the shorter side of 32: 40 columns in all
        (RandLora(rank=10), 10 * (64 * 1 + 32), 64 * 32 * 40),
        (RandLora(rank=10, basis="ternary", sparsity=3), 10 * (64 * 1 + 32), 64 * 32 * 40),
        (
            OfficialNola(rank=2, bases=5, alpha=1.0, layout="plain", start="A"),
            2 * 5 * (64 + 32),
            64 * 32 * 2,
        ),
    ],
    ids=making.ids,
)
def test_the_estimate_counted_by_hand(method: Form, draws: int, products: int) -> None:
    target = Target(name="w", dtype="F32", shape=(32, 64), transposed=True, index=0)
    work = cost.estimate(method, [target])
    assert (work.draws, work.products) == (draws, products)
    assert work.operations == products + 100 * draws


@pytest.mark.parametrize(
    "method",
    [
        Nola(rank=8, bases=4096),
        Nola(rank=64, bases=1024),
        Lora(rank=512),
        Vera(rank=1024),
        UniLora(rank=64, bases=1 << 20),
        RandLora(rank=32),
        RandLora(rank=1, basis="ternary", sparsity=100),
        OfficialNola(rank=8, bases=1000, alpha=16.0, layout="plain", start="both"),
        PeftRandLora(
            rank=32, alpha=640, basis="dense", dtype="float32", small=384, large=384,
            fingerprint=PRINT,
        ),
        PeftVera(rank=1024, basis="drawn", height=384, width=384, fingerprint=PRINT),
        PeftUniLora(rank=4, bases=23040, total=4 * 8192, dtype="float32", fingerprint=PRINT),
    ],
    ids=making.ids,
)  # fmt: skip
@pytest.mark.parametrize("width", [384, 4096])
def test_what_people_train_is_allowed(method: Form, width: int) -> None:
    """On a small encoder of 36 matrices and on a decoder of 7 billion weights."""
    cost.check(_wide(method, width), square(width, 36 if width == 384 else 224))


def _wide(method: Form, width: int) -> Form:
    if isinstance(method, PeftRandLora):
        return replace(method, small=width, large=width)
    return replace(method, height=width, width=width) if isinstance(method, PeftVera) else method


@pytest.mark.parametrize(
    "method",
    [
        Nola(rank=2048, bases=4096),
        Nola(rank=8, bases=1 << 24),
        Nola(rank=4096, bases=256),
        OfficialNola(rank=4096, bases=1 << 20, alpha=1.0, layout="plain", start="A"),
    ],
    ids=str,
)
def test_a_bomb_is_refused(method: Form) -> None:
    with pytest.raises(FileError, match=r"operations here, about \d+ s of one core"):
        cost.check(method, square(4096))


def bomb(folder: Path) -> tuple[Path, Path]:
    """A base of 16 MB, and a file of a few kilobytes that would take seconds."""
    rng = np.random.default_rng(0)
    values = making.bits_of("F32", rng.normal(size=(2048, 2048)) * 0.02)
    base = making.write(folder / "base.safetensors", {"w": ("F32", (2048, 2048), values)})
    made = making.delta(base, Nola(rank=8, bases=4096), patterns=Patterns(include=("w",)), bits=4)

    def wider(table: dict[str, dict[str, int]]) -> None:
        table["method"]["rank"] = 2048

    return base, making.reforged(folder / "task.kd", made, wider)


def test_a_bomb_is_refused_before_the_work_wherever_a_base_comes_in(tmp_path: Path) -> None:
    base, file = bomb(tmp_path)
    start = time.perf_counter()
    with pytest.raises(FileError, match="nola of rank 2048 would take") as caught:
        kilodelta.load(file, base=base)
    with pytest.raises(FileError, match="nola of rank 2048 would take"):
        kilodelta.merge(base, file, tmp_path / "out.safetensors")
    assert time.perf_counter() - start < 2
    assert not (tmp_path / "out.safetensors").exists()
    # The fix works as it is printed.
    limit = float(caught.value.fix.rpartition("max_work=")[2].rstrip(")"))
    kept = kilodelta.load(file, base=base, max_work=limit)
    assert kept.bind(base).targets.keys() == {"w"}
    with pytest.raises(FileError, match=r"1e\+03 are allowed"):
        kilodelta.load(file, base=base, max_work=1000)
