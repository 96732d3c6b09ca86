"""Targets that are the matrices of one stacked tensor: each has its own update, and one digest."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kilodelta
from kilodelta.errors import BaseMismatchError, FileError, InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor, TensorInfo
from kilodelta.format.delta import Delta
from kilodelta.format.file import load
from kilodelta.format.inspect import inspect
from kilodelta.format.methods import Lora, Method
from kilodelta.format.targets import Patterns, select
from kilodelta.merging.diff import diff
from tests.support.making import METHODS, bits_of, delta, ids, reforged, write

EXPERTS, ROWS, COLUMNS = 3, 8, 9
TYPES = {"a.down": "BF16", "a.up": "F16", "b.experts": "F32"}
PATTERNS = Patterns(include=("*",), transposed=("*.up",), stacked=("a.*", "b.experts"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, shape = np.random.default_rng(3), (EXPERTS, ROWS, COLUMNS)
    held: dict[str, tuple[str, tuple[int, ...], bytes]] = {
        name: (kind, shape, bits_of(kind, rng.normal(size=shape))) for name, kind in TYPES.items()
    }
    plain = (ROWS, COLUMNS)
    held["plain"] = ("F32", plain, bits_of("F32", rng.normal(size=plain)))
    return write(tmp_path_factory.mktemp("stacked") / "base.safetensors", held)


def words(text: bytes, kind: str) -> np.ndarray[Any, Any]:
    """A tensor's values, float32."""
    if kind == "BF16":
        return (np.frombuffer(text, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(text, "<f2" if kind == "F16" else "<f4").astype(np.float32)


def rounded(values: np.ndarray[Any, Any], kind: str) -> bytes:
    """float32 as a tensor's bytes, to nearest even."""
    if kind == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    return values.astype("<f2" if kind == "F16" else "<f4").tobytes()


def merged_by_loops(made: Delta, source: Checkpoint, name: str) -> bytes:
    """Each expert's matrix by the method's scalar loops, one after the other."""
    kind = source.info(name).dtype
    old = words(source.data(name).tobytes(), kind).reshape(EXPERTS, ROWS, COLUMNS)
    new = np.empty_like(old)
    for expert in range(EXPERTS):
        own = f"{name}[{expert}]"
        q = {group: values.tolist() for group, values in made.coefficients(own).items()}
        target = made.target(own)
        dq = made.method.scalar(q, target.matrix, made.manifest.seed, target.index)
        c, e = made.scale(own)
        for row in range(ROWS):
            for column in range(COLUMNS):
                entry = dq[column][row] if target.transposed else dq[row][column]
                step = np.ldexp(np.float32(c * entry), e)
                new[expert, row, column] = old[expert, row, column] + np.float32(step)
    return rounded(new, kind)


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_every_matrix_merges_as_scalar_loops_say(
    method: Method, base: Path, tmp_path: Path
) -> None:
    made = delta(base, method, patterns=PATTERNS)
    made.save(tmp_path / "a.kd")
    again = load(tmp_path / "a.kd", base=base)
    assert again.manifest.text() == made.manifest.text()
    out = tmp_path / "merged.safetensors"
    done = kilodelta.merge(base, tmp_path / "a.kd", out)
    assert (done.targets, done.copied) == (4, 0)  # tensors
    source, merged, digests = Checkpoint.open(base), Checkpoint.open(out), []
    for name in (*TYPES, "plain"):
        if name in TYPES:
            assert merged.data(name).tobytes() == merged_by_loops(made, source, name)
        info = source.info(name)
        shape = ",".join(map(str, info.shape)).encode()
        parts = name.encode(), info.dtype.encode(), shape, merged.data(name).tobytes()
        digests.append(hashlib.sha256(b"\0".join(parts)).digest())
    root = hashlib.sha256(b"".join(digests)).hexdigest()  # a stack is one tensor of the result
    assert made.manifest.result == f"sha256:{root}"


def test_the_matrices_are_named_and_counted(base: Path) -> None:
    made = delta(base, Lora(rank=2), patterns=PATTERNS)
    assert list(made.targets)[:4] == ["a.down[0]", "a.down[1]", "a.down[2]", "a.up[0]"]
    assert [target.index for target in made.targets.values()] == list(range(10))
    assert made.target("a.down[1]").matrix == (ROWS, COLUMNS)
    assert made.target("a.up[1]").matrix == (COLUMNS, ROWS)
    assert list(made.tensors) == ["a.down", "a.up", "b.experts", "plain"]
    assert made.manifest.count == 10
    assert made.expand("a.up[2]").shape == (COLUMNS, ROWS)


def test_twelve_experts_stand_in_their_own_order() -> None:
    info = TensorInfo(name="e", dtype="F32", shape=(12, 2, 2))
    chosen = select([info], Patterns(include=("*",), stacked=("e",)))
    assert [target.part for target in chosen] == list(range(12))
    assert {target.tensor for target in chosen} == {"e"}


def test_a_name_that_ends_like_a_matrix_of_a_stack_is_itself() -> None:
    infos = [TensorInfo(name=name, dtype="F32", shape=(2, 3)) for name in ("e[0]", "e[1]")]
    chosen = select(infos, Patterns(include=("*",), stacked=("*",)))  # no stacks: two dimensions
    assert [target.tensor for target in chosen] == ["e[0]", "e[1]"]


def test_a_tensor_named_like_a_matrix_of_the_stack_is_refused() -> None:
    infos = [
        TensorInfo(name="e", dtype="F32", shape=(2, 2, 3)),
        TensorInfo(name="e[1]", dtype="F32", shape=(2, 3)),
    ]
    with pytest.raises(InputError, match=r"e\[1\] is both a tensor .* of the stack e\n"):
        select(infos, Patterns(include=("*",), stacked=("e",)))
    assert len(select(infos, Patterns(include=("*",), exclude=("e[[]1]",), stacked=("e",)))) == 2


def test_a_file_without_stacks_is_spelled_as_before(base: Path) -> None:
    plain = delta(base, Lora(rank=2), patterns=Patterns(include=("plain",)))
    assert '"targets":{"count":1,"exclude":[],"include":["plain"],"transposed":[]}' in (
        plain.manifest.text()
    )


def test_threads_and_the_python_merge_agree(base: Path, tmp_path: Path) -> None:
    made = delta(base, Lora(rank=2), patterns=PATTERNS)
    for threads in (1, 2):
        kilodelta.merge(base, made, tmp_path / f"{threads}.safetensors", threads=threads)
    one, two = ((tmp_path / f"{n}.safetensors").read_bytes() for n in (1, 2))
    assert one == two


def test_inspect_and_diff_show_them(base: Path, tmp_path: Path) -> None:
    delta(base, Lora(rank=2), patterns=PATTERNS).save(tmp_path / "a.kd")
    delta(base, Lora(rank=1), patterns=PATTERNS).save(tmp_path / "b.kd")
    assert inspect(tmp_path / "a.kd").targets["stacked"] == ("a.*", "b.experts")
    rows = diff(tmp_path / "a.kd", tmp_path / "b.kd", base=base).rows
    assert {row.name for row in rows} >= {"a.down[0]", "b.experts[2]", "plain"}


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "targets.stacked is empty"),
        ("*", "targets.stacked is not a list"),
        ([1], "targets.stacked"),
        (None, "targets.stacked is empty"),
    ],
)
def test_a_wrong_list_is_refused(value: Any, why: str, base: Path, tmp_path: Path) -> None:
    made = delta(base, Lora(rank=2), patterns=PATTERNS)
    path = reforged(tmp_path / "a.kd", made, lambda t: t["targets"].update(stacked=value))
    with pytest.raises(FileError, match=why):
        load(path)


def test_a_file_that_lost_its_list_does_not_fit(base: Path, tmp_path: Path) -> None:
    made = delta(base, Lora(rank=2), patterns=PATTERNS)
    path = reforged(tmp_path / "a.kd", made, lambda t: t["targets"].pop("stacked"))
    with pytest.raises(BaseMismatchError, match="match 4 tensors of this model, not 10"):
        load(path, base=base)
    fewer = reforged(tmp_path / "b.kd", made, lambda t: t["targets"].update(stacked=["a.*"]))
    with pytest.raises(BaseMismatchError, match="match 8 matrices of this model, not 10"):
        load(fewer, base=base)


def test_a_stack_is_no_extra_as_well(base: Path) -> None:
    extras = {"a.down": RawTensor.copy_of(np.zeros(3, np.float32))}
    with pytest.raises(FileError, match=r"a\.down is a target and an extra as well"):
        delta(base, Lora(rank=1), patterns=PATTERNS, extras=extras)


def test_a_compatibility_form_changes_no_stack(base: Path, tmp_path: Path) -> None:
    made = delta(base, Lora(rank=2), patterns=PATTERNS)
    drawn = {"name": "peft-vera", "rank": 2, "basis": "drawn", "height": 9, "width": 9}

    def change(table: dict[str, Any]) -> None:
        table["method"] = {**drawn, "fingerprint": "sha256:" + "0" * 64}

    with pytest.raises(FileError, match="changes no stacked tensor"):
        load(reforged(tmp_path / "a.kd", made, change))
