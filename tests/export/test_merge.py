"""Merging and proving: what is written, what is refused, and that nothing half-done stays."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import kilodelta
from kilodelta.errors import (
    BaseMismatchError,
    CheckpointError,
    InputError,
    OutputError,
    ProofError,
)
from kilodelta.export.merge.checkpoint import merge
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora, Method, Nola
from kilodelta.format.targets import Patterns
from kilodelta.progress import Event
from kilodelta.verify.digests.proof import prove
from tests.support.making import METHODS, delta, folder, ids, model, write


def contents(path: Path) -> dict[str, bytes]:
    found = Checkpoint.open(path)
    return {name: found.data(name).tobytes() for name in found.names}


def leftovers(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir() if p.name.startswith("."))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_a_folder_keeps_everything_but_the_targets(
    method: Method, shards: int, tmp_path: Path
) -> None:
    base = folder(tmp_path / "base", model(), shards)
    made = delta(base, method)
    done = merge(base, made, tmp_path / "out")
    before, after = contents(base), contents(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == set(made.targets)
    assert (done.targets, done.copied, done.extras) == (5, 3, 0)
    names = {p.relative_to(base) for p in base.rglob("*")}
    assert {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*")} == names
    for name in sorted(names):
        if (base / name).is_file() and name.suffix != ".safetensors":
            assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert prove(base, made, tmp_path / "out").merged == kilodelta.digest(tmp_path / "out").root


def test_threads_and_layouts_agree(tmp_path: Path) -> None:
    single = write(tmp_path / "base.safetensors", model())
    made = delta(single, Nola(rank=3, bases=70))
    merge(single, made, tmp_path / "one.safetensors", threads=1)
    merge(single, made, tmp_path / "two.safetensors", threads=2)
    sharded = folder(tmp_path / "base", model(), 3)
    merge(sharded, made, tmp_path / "three")
    backwards = write(tmp_path / "back.safetensors", dict(reversed(model().items())))
    merge(backwards, made, tmp_path / "four.safetensors")
    expected = contents(tmp_path / "one.safetensors")
    for other in ("two.safetensors", "three", "four.safetensors"):
        assert contents(tmp_path / other) == expected
    with safe_open(tmp_path / "one.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(expected)
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("shards", [1, 2])
def test_extras_replace_grow_and_are_added(shards: int, tmp_path: Path) -> None:
    base = folder(tmp_path / "base", model(), shards)
    extras = {
        "norm.bias": RawTensor.copy_of(np.arange(9, dtype=np.float32)),
        "norm.weight": RawTensor.copy_of(np.ones((2, 5), np.float16)),
        "classifier.weight": RawTensor.copy_of(np.full((3, 9), 0.5, np.float32)),
    }
    made = delta(base, Lora(rank=1), extras=extras)
    merge(base, made, tmp_path / "out")
    found = Checkpoint.open(tmp_path / "out")
    for name, tensor in extras.items():
        assert found.info(name).shape == tensor.shape
        assert found.data(name).tobytes() == tensor.data.tobytes()
    assert found.data("count").tobytes() == Checkpoint.open(base).data("count").tobytes()
    prove(base, made, tmp_path / "out")


def test_the_base_s_weights_in_other_forms_stay_behind(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", model())
    (base / "pytorch_model.bin").write_bytes(b"old weights")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_bytes(b"old weights")
    done = merge(base, delta(base, Lora(rank=1)), tmp_path / "out")
    why = "the base's weights in another form"
    assert done.left_out == {"onnx/": why, "pytorch_model.bin": why}
    assert not (tmp_path / "out" / "onnx").exists()


def test_transformers_opens_the_result(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    before = transformers.BertModel(config)
    before.save_pretrained(tmp_path / "base")
    patterns = Patterns(include=("encoder.*",))
    made = delta(tmp_path / "base", Nola(rank=2, bases=20), patterns=patterns)
    merge(tmp_path / "base", made, tmp_path / "out")
    after = transformers.AutoModel.from_pretrained(tmp_path / "out")
    name = "encoder.layer.0.attention.self.query.weight"
    weights = before.state_dict()[name].numpy().astype(np.float64)
    c, e = made.scale(name)
    update = made.expand(name).astype(np.float64) * c * 2.0**e
    expected = weights + update
    # Two float32 roundings, of the update and of the sum: 2^-24 of each, and second order.
    limit = (np.abs(expected) + np.abs(update)) * 2.0**-24 * (1 + 2.0**-20)
    assert (np.abs(after.state_dict()[name].numpy() - expected) <= limit).all()


def test_a_wrong_base_is_refused_by_name_before_a_byte_is_written(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", model())
    made = delta(base, Lora(rank=1))
    other = model()
    other["tall.weight"] = model(seed=5)["tall.weight"]
    other["zz.extra"] = ("U8", (1,), b"1")
    del other["norm.bias"]
    wrong = write(tmp_path / "wrong.safetensors", other)
    with pytest.raises(BaseMismatchError) as caught:
        merge(wrong, made, tmp_path / "out.safetensors")
    assert "changed: tall.weight\n" in caught.value.what
    assert "extra: zz.extra\n" in caught.value.what
    assert "missing: 1 after h.0.c_attn.weight" in caught.value.what
    assert "test/base" in caught.value.what
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "wrong.safetensors"]


def test_existing_and_impossible_outputs(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", model(), 2)
    made = delta(base, Lora(rank=1))
    with pytest.raises(OutputError, match="exists already"):
        merge(base, made, base)
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        merge(base, made, tmp_path / "no" / "folder")
    with pytest.raises(InputError, match=r"--min-changed 0\.5 is a share of codes"):
        merge(base, made, tmp_path / "out", min_changed=0.5)
    assert merge(base, made, tmp_path / "any", min_changed=0).targets  # 0 takes any result
    with pytest.raises(InputError, match="has 2 shards"):
        merge(base, made, tmp_path / "one.safetensors")
    assert leftovers(tmp_path) == []
    single = write(tmp_path / "single.safetensors", model())
    before = single.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        merge(single, delta(single, Lora(rank=1)), single)
    assert single.read_bytes() == before


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = folder(tmp_path / "base", model())
    made = delta(base, Lora(rank=1))
    original, calls = os.pwrite, []

    def full(descriptor: int, data: bytes, position: int) -> int:
        calls.append(position)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="No space left on device"):
        merge(base, made, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", model())
    made = delta(base, Lora(rank=1))

    def interrupt(event: Event) -> None:
        if event.stage == "merge" and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(base, made, tmp_path / "out", progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", model())
    events: list[Event] = []
    made = delta(base, Lora(rank=1))
    done = merge(base, made, tmp_path / "out.safetensors", progress=events.append)
    last = [event for event in events if event.stage == "merge"][-1]
    assert last.done == last.total == done.nbytes
    pieces = str(last.detail["tensors"]).split("/")
    assert pieces[0] == pieces[1] != "0"
    assert done.nbytes == (tmp_path / "out.safetensors").stat().st_size


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_base_that_holds_nan_or_infinity_is_refused(value: float, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", model())
    tensors = model()
    weights = np.frombuffer(tensors["conv.weight"][2], "<f4").copy()
    weights[5] = value
    tensors["conv.weight"] = ("F32", (8, 3, 2, 2), weights.tobytes())
    bad = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"conv.weight holds NaN or infinity"):
        delta(bad, Lora(rank=1))
    made = delta(base, Lora(rank=1))
    forged = replace(
        made,
        manifest=replace(
            made.manifest, base=replace(made.manifest.base, root=kilodelta.digest(bad).root)
        ),
    )
    with pytest.raises(CheckpointError, match=r"conv.weight holds NaN or infinity"):
        merge(bad, forged, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    # In a tensor that is no target it is nobody's business.
    untouched = Patterns(include=("*.weight",), exclude=("norm*", "conv*"), transposed=("h.*",))
    merge(bad, delta(bad, Lora(rank=1), patterns=untouched), tmp_path / "fine.safetensors")


def test_a_weight_that_leaves_float16_is_refused(tmp_path: Path) -> None:
    weights = np.full((4, 4), 65504.0, np.float16).tobytes()
    base = write(tmp_path / "base.safetensors", {"w": ("F16", (4, 4), weights)})
    from kilodelta.format.quantise import Quantised, Scale
    from kilodelta.merging import build

    one = Quantised(q=np.ones((1, 4), np.int8), scale=Scale(64, 0))
    groups = {"w": {"A": one, "B": replace(one, q=one.q.T)}}
    recipe = build.Recipe(method=Lora(rank=1), patterns=Patterns(include=("w",)))
    with pytest.raises(ProofError, match="out of the range of F16"):
        build.build(base, recipe, groups)


def tampered(made: Delta) -> Delta:
    return replace(made, manifest=replace(made.manifest, result="sha256:" + "1" * 64))


def test_a_result_that_is_not_the_promised_one(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", model())
    wrong = tampered(delta(base, Lora(rank=1)))
    with pytest.raises(ProofError, match="the file says sha256:1111"):
        merge(base, wrong, tmp_path / "out")
    with pytest.raises(ProofError, match="the file says sha256:1111"):
        prove(base, wrong)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_proof_reads_every_byte_of_a_merged_model(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", model())
    made = delta(base, Lora(rank=1))
    out = tmp_path / "out.safetensors"
    merge(base, made, out)
    data = bytearray(out.read_bytes())
    start = Checkpoint.open(out).shards[0].layout.data_start
    for position in (start, start + 200, len(data) - 1):
        data[position] ^= 1
        out.write_bytes(data)
        with pytest.raises(ProofError, match="changed: "):
            prove(base, made, out)
        data[position] ^= 1
    with pytest.raises(ProofError, match="is not this base with this file merged"):
        prove(base, made, base)


def test_proof_does_not_trust_remembered_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kilodelta.files import digest_cache

    base = write(tmp_path / "base.safetensors", model())
    made = delta(base, Lora(rank=1))
    other = write(tmp_path / "other.safetensors", model(seed=3))
    true = dict(kilodelta.digest(base).tensors)
    monkeypatch.setattr(digest_cache, "load", lambda path: true)
    with pytest.raises(BaseMismatchError):
        prove(other, made)
