"""A base that is cut, changed or replaced while it is merged: an error, and nothing is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kilodelta
from kilodelta.errors import BaseMismatchError, CheckpointError, ProofError
from kilodelta.export.merge.checkpoint import merge
from kilodelta.files import digest_cache
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.source import SourceFile
from kilodelta.format.methods import Lora
from kilodelta.progress import Event, Progress
from tests.support.making import delta, folder, model, write


@pytest.fixture(autouse=True)
def _hashed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every merge hashes its base, and a change at the end of that goes unnoticed, as one does a
    moment later."""
    monkeypatch.setattr(digest_cache, "load", lambda shard: None)
    monkeypatch.setattr(SourceFile, "is_unchanged", lambda file: True)


def once_proved(change: Callable[[], object]) -> Progress:
    """Change something between the proof of the base and the first byte that is merged."""
    done: list[object] = []

    def progress(event: Event) -> None:
        if event.stage == "hash" and event.done == event.total and not done:
            done.append(change())

    return progress


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def where(base: Path, name: str) -> int:
    _, entry = Checkpoint.open(base).entry(name)
    return entry.begin


@pytest.mark.parametrize("name", ["norm.bias", "count", "tall.weight"])
def test_a_tensor_that_changes_after_the_proof(name: str, tmp_path: Path) -> None:
    """Copied tensors and targets alike; the message blames the base, and not the delta."""
    base = write(tmp_path / "base.safetensors", model())
    made = delta(base, Lora(rank=1))
    place = where(base, name)
    with pytest.raises(BaseMismatchError, match=f"{name} in .*base.safetensors is not the base's"):
        merge(
            base,
            made,
            tmp_path / "out.safetensors",
            progress=once_proved(lambda: flip(base, place)),
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors"]


@pytest.mark.parametrize("left", [0, 100, 1800])
def test_a_base_that_is_cut(left: int, tmp_path: Path) -> None:
    """Neither SIGBUS nor a loop that waits for the bytes."""
    base = folder(tmp_path / "base", model())
    made = delta(base, Lora(rank=1))
    file = base / "model.safetensors"
    assert left < file.stat().st_size
    with pytest.raises(CheckpointError, match=rf"model\.safetensors ends at byte {left} of"):
        merge(base, made, tmp_path / "out", progress=once_proved(lambda: os.truncate(file, left)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_remembered_digest_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose size and times say nothing, as mmap and a turned clock can arrange."""
    base = write(tmp_path / "base.safetensors", model())
    made = delta(base, Lora(rank=1))
    remembered = dict(kilodelta.digest(base).tensors)
    flip(base, where(base, "norm.bias"))
    monkeypatch.setattr(digest_cache, "load", lambda shard: remembered)
    with pytest.raises(BaseMismatchError, match=r"norm\.bias in .* is not the base's"):
        merge(base, made, tmp_path / "out.safetensors")


def test_a_wrong_delta_is_still_blamed_where_the_base_is_right(tmp_path: Path) -> None:
    from dataclasses import replace

    base = write(tmp_path / "base.safetensors", model())
    made = delta(base, Lora(rank=1))
    wrong = replace(made, manifest=replace(made.manifest, result="sha256:" + "1" * 64))
    with pytest.raises(ProofError, match="the file says sha256:1111"):
        merge(base, wrong, tmp_path / "out.safetensors")


def test_slices_are_the_mapped_bytes(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", model(), 3)
    checkpoint = Checkpoint.open(base)
    for name in checkpoint.names:
        wanted, found = checkpoint.data(name), checkpoint.tensor(name)
        assert found.size == wanted.size
        assert np.array_equal(found[3 : found.size], wanted[3:])
        assert b"".join(part.tobytes() for part in found.chunks(7)) == wanted.tobytes()


def test_a_base_that_is_removed_or_replaced_stays_the_one_that_was_opened(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", model())
    made = delta(base, Lora(rank=1))
    wanted = merge(base, made, tmp_path / "wanted.safetensors").path.read_bytes()

    def replace_base() -> None:
        base.unlink()
        write(base, model(seed=1))

    for number, act in enumerate((replace_base, base.unlink)):
        write(base, model())
        out = tmp_path / f"{number}.safetensors"
        merge(base, made, out, progress=once_proved(act))
        assert out.read_bytes() == wanted
