"""Merging into the grid of a quantised base: codes, digests, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

import kilodelta
from kilodelta.cli import main
from kilodelta.errors import (
    BaseMismatchError,
    FileError,
    InputError,
    KiloDeltaError,
    OutputError,
    ProofError,
    QualityError,
)
from kilodelta.export.merge.in_grid import Tally, grid_stream, merge_weight
from kilodelta.files import canonical
from kilodelta.format import manifest as manifests
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora, Nola
from kilodelta.format.targets import Patterns
from kilodelta.grid import Matrix, open_quantised
from kilodelta.grid.reference import new_code
from kilodelta.merging.build import Recipe, build, quantise_target
from kilodelta.merging.rebase import rebased
from kilodelta.verify.digests.proof import prove
from tests.support import grids
from tests.support.grids import Numbers

A, B = Numbers(16, 64, 32, zeros=True), Numbers(24, 32, 32, zeros=True, seed=5)
NORM = {"norm.weight": np.ones(8, np.float32)}
ASYMMETRIC = grids.ct_config(symmetric=False)
PATTERNS = Patterns(include=("*.weight",), exclude=("norm*",))


def packed() -> dict[str, Any]:
    return {
        **grids.pack_quantized("a", A, zeros=True),
        **grids.pack_quantized("b", B, zeros=True),
        **NORM,
    }


def made(base: Path, *, size: float = 1.0, seed: int = 3, **recipe: Any) -> Delta:
    """A LoRA of rank 4 for every matrix of a base; `size` scales its update."""
    rng, lora = np.random.default_rng(seed), Lora(rank=4)
    model = open_quantised(base)
    shapes = {name: stored.shape for name, stored in model.stored.items()}
    coefficients = {
        name: quantise_target(
            lora,
            {"A": rng.normal(size=(4, in_)) / 4 * size, "B": rng.normal(size=(out, 4)) / 8},
            8,
        )
        for name, (out, in_) in shapes.items()
    }
    given = {"method": lora, "patterns": PATTERNS, "name": "tiny", **recipe}
    return build(base, Recipe(**given), coefficients)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = grids.folder(tmp_path_factory.mktemp("grid") / "base", ASYMMETRIC, packed())
    (place / "tokenizer.json").write_text("{}")
    return place


@pytest.fixture(scope="module")
def file(base: Path) -> Path:
    path = base.parent / "task.kd"
    made(base).save(path)
    return path


def by_fractions(delta: Delta, name: str, matrix: Matrix) -> npt.NDArray[Any]:
    """New codes by scalar arithmetic, from the exact update."""
    c, e = delta.scale(name)
    update, groups = delta.expand(name), matrix.groups
    found = np.empty_like(matrix.codes)
    for i, j in np.ndindex(matrix.shape):
        block = (i // matrix.block[0], groups[j])
        zero = 0 if matrix.zeros is None else int(matrix.zeros[block])
        found[i, j] = new_code(
            matrix.kind,
            int(matrix.codes[i, j]),
            zero,
            float(matrix.steps[block]),
            int(update[i, j]) * c * Fraction(2) ** e,
        )
    return found


def test_codes_are_those_of_plain_fractions(base: Path, file: Path, tmp_path: Path) -> None:
    done = kilodelta.merge(base, file, tmp_path / "out")
    before, after = open_quantised(base), open_quantised(tmp_path / "out")
    delta = kilodelta.load(file, base=base)
    changed = 0
    for name in delta.grid_targets:
        old, new = before.matrix(name), after.matrix(name)
        assert np.array_equal(new.codes, by_fractions(delta, name, old))
        assert np.array_equal(new.steps, old.steps)
        changed += int((new.codes != old.codes).sum())
    assert (done.codes, done.codes_changed, done.still) == (16 * 64 + 24 * 32, changed, 64)
    assert 0.3 < changed / done.codes < 0.9
    first, second = kilodelta.digest(base).tensors, kilodelta.digest(tmp_path / "out").tensors
    assert {n for n in first if first[n] != second[n]} == {"a.weight_packed", "b.weight_packed"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "config.json").read_text() == (base / "config.json").read_text()
    assert prove(base, file, tmp_path / "out").merged == after.identity().root


def test_one_file_fits_every_spelling_of_its_base(base: Path, file: Path, tmp_path: Path) -> None:
    """And all the merged models are one."""
    wide = {**grids.pack_quantized("a", A, zeros=True, dtype="float32"),
            **grids.pack_quantized("b", B, zeros=True, dtype="float32")}  # fmt: skip
    half = {"norm.weight": np.ones(8, np.float16)}
    spellings = {
        "gptq": (grids.GPTQ, {**grids.gptq("a", A), **grids.gptq("b", B), **NORM}),
        "awq": (grids.AWQ, {**grids.awq("a", A), **grids.awq("b", B), **half}),
        "wide": (ASYMMETRIC, {**wide, **NORM}),
    }
    kilodelta.merge(base, file, tmp_path / "first")
    roots = {open_quantised(tmp_path / "first").identity().root}
    for name, (config, tensors) in spellings.items():
        place = grids.folder(tmp_path / name, config, tensors)
        kilodelta.merge(place, file, tmp_path / f"{name}-out")
        roots.add(open_quantised(tmp_path / f"{name}-out").identity().root)
        prove(place, file, tmp_path / "first")
        prove(base, file, tmp_path / f"{name}-out")
    assert len(roots) == 1


RNG = np.random.default_rng(8)


def e4m3(shape: tuple[int, int]) -> npt.NDArray[Any]:
    codes = RNG.integers(0, 0x7F, shape, np.uint8) | (RNG.integers(0, 2, shape, np.uint8) << 7)
    return np.asarray(codes.astype(np.uint8).view(ml_dtypes.float8_e4m3fn))


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nvfp4": (
        grids.NVFP4,
        {
            "a.weight_packed": RNG.integers(0, 256, (8, 16), np.uint8),
            "a.weight_scale": RNG.integers(0, 0x70, (8, 2), np.uint8).view(ml_dtypes.float8_e4m3fn),
            "a.weight_global_scale": np.array([13297], np.float32),
        },
    ),
    "modelopt": (
        grids.MODELOPT,
        {
            "a.weight": RNG.integers(0, 256, (8, 16), np.uint8),
            "a.weight_scale": RNG.integers(0, 0x70, (8, 2), np.uint8).view(ml_dtypes.float8_e4m3fn),
            "a.weight_scale_2": np.array(1 / 700, np.float32),
        },
    ),
    "fp8": (
        grids.FP8,
        {
            "a.weight": e4m3((130, 20)),
            "a.weight_scale_inv": (RNG.normal(size=(2, 1)) / 50).astype(np.float32),
        },
    ),
}


@pytest.mark.parametrize("layout", OTHERS)
def test_small_float_grids(tmp_path: Path, layout: str) -> None:
    config, tensors = OTHERS[layout]
    place = grids.folder(tmp_path / "base", config, tensors)
    delta = made(place)
    kilodelta.merge(place, delta, tmp_path / "out")
    old = open_quantised(place).matrix("a.weight")
    new = open_quantised(tmp_path / "out").matrix("a.weight")
    assert np.array_equal(new.codes, by_fractions(delta, "a.weight", old))
    prove(place, delta, tmp_path / "out")


@pytest.mark.parametrize("layout", ["int4", "int3", *OTHERS])
def test_weights_merged_some_rows_at_a_time_are_those_merged_whole(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bands of a few rows, that share steps with others, give the stored bytes of the whole."""
    if layout in OTHERS:
        config, tensors = OTHERS[layout]
    else:
        bits = int(layout[3:])  # rows of three bits end in padding
        numbers = Numbers(24, 36, 12, zeros=True, bits=bits)
        config = grids.ct_config(symmetric=False, num_bits=bits, group_size=12)
        tensors = grids.pack_quantized("a", numbers, zeros=True)
    base = grids.folder(tmp_path / "base", config, tensors)
    delta, model, tally = made(base), open_quantised(base), Tally()
    (name,) = delta.grid_targets
    delta = delta.bind(model)
    whole, digest = merge_weight(delta, model, name, model.parts(name), tally)
    monkeypatch.setattr("kilodelta.merging.in_grid.BAND", 5 * model.of(name).shape[1])
    done = kilodelta.merge(base, delta, tmp_path / "out", min_changed=0)
    merged = open_quantised(tmp_path / "out")
    assert merged.source.raw(merged.of(name).codes).equals(whole)
    assert merged.identity().weights[name] == digest
    assert (done.codes_changed, done.codes) == (tally.changed, tally.weights)


def write_gguf(path: Path, kinds: dict[str, npt.NDArray[Any]]) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, data in kinds.items():
        kind = name.rpartition(".")[2]
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_merged_in_place(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    weights = RNG.normal(size=(4, 256)).astype(np.float32) / 8
    blocks = {
        f"blk.0.{kind}": gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
        for kind in ("Q4_0", "Q4_1", "Q8_0")
    }
    for kind, nbytes, begins in (("Q4_K", 144, (0, 2)), ("Q6_K", 210, (208,))):
        data = RNG.integers(0, 256, (4, nbytes), np.uint8)
        for begin in begins:
            steps = (RNG.normal(size=4) / 500).astype(np.float16)
            data[:, begin : begin + 2] = steps.view(np.uint8).reshape(4, 2)
        blocks[f"blk.0.{kind}"] = data
    path = write_gguf(tmp_path / "base.gguf", blocks)
    delta = made(path, size=0.2, patterns=Patterns(include=("blk.*.weight",)))
    done = kilodelta.merge(path, delta, tmp_path / "out.gguf")
    before, after = open_quantised(path), open_quantised(tmp_path / "out.gguf")
    assert done.codes == 5 * 4 * 256
    for name in before.stored:
        old, new = before.matrix(name), after.matrix(name)
        assert np.array_equal(new.codes, by_fractions(delta, name, old)), name
        assert np.array_equal(new.steps, old.steps)
    assert path.stat().st_size == (tmp_path / "out.gguf").stat().st_size
    prove(path, delta, tmp_path / "out.gguf")
    with pytest.raises(InputError, match="is to be something else"):
        kilodelta.merge(path, delta, tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        kilodelta.merge(path, delta, tmp_path / "out.gguf")


@pytest.mark.parametrize("external", [False, True])
def test_a_graph_is_merged_and_runs(tmp_path: Path, external: bool) -> None:
    """One file for the checkpoint and for its MatMulNBits graph; ONNX Runtime runs the codes."""
    ort, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    c, d = Numbers(16, 64, 32, zeros=True), Numbers(24, 64, 32, zeros=True, seed=5)
    tensors = {
        **grids.pack_quantized("c", c, zeros=True),
        **grids.pack_quantized("d", d, zeros=True),
    }
    place = grids.folder(tmp_path / "base", ASYMMETRIC, {**tensors, **NORM})
    delta = made(place)
    (tmp_path / "graph").mkdir()
    graph = tmp_path / "graph" / "m.onnx"
    grids.matmul_graph(graph, {"c.weight": c, "d.weight": d}, zeros=True)
    if external:
        loaded = onnx.load(graph)
        graph.unlink()
        onnx.save(loaded, graph, save_as_external_data=True, location="w.bin", size_threshold=0)
    kilodelta.merge(place, delta, tmp_path / "out")
    done = kilodelta.merge(graph, delta, tmp_path / "merged.onnx")
    assert (tmp_path / "merged.onnx.data").exists() is external
    checkpoint, merged = (open_quantised(tmp_path / n) for n in ("out", "merged.onnx"))
    assert checkpoint.identity().root == merged.identity().root
    assert done.codes_changed > 500
    prove(graph, delta, tmp_path / "merged.onnx")
    session = ort.InferenceSession(tmp_path / "merged.onnx", providers=["CPUExecutionProvider"])
    first, second = session.run(None, {"x": np.eye(64, dtype=np.float32)})
    for found, name in ((first, "c.weight"), (second, "d.weight")):
        values = checkpoint.matrix(name).values()
        assert np.array_equal(found.T + 0.0, values.astype(np.float32))
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    weight = checkpoint.matrix("c.weight").values()
    wanted = x.astype(np.float64) @ weight.T
    # One rounding per weight and at most 64 + 1 per sum: |error| <= 66 * 2^-24 * sum |x w|.
    limit = 66 * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(weight).T)
    assert (np.abs(session.run(None, {"x": x})[0] - wanted) <= limit).all()


def test_a_graph_takes_codes_only(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    c = Numbers(16, 64, 32)
    place = grids.folder(tmp_path / "base", grids.CT, {**grids.pack_quantized("c", c), **NORM})
    from kilodelta.files.tensor import RawTensor

    delta = made(place, extras={"head.weight": RawTensor.of(np.ones(3, np.float32))})
    graph = grids.matmul_graph(tmp_path / "m.onnx", {"c.weight": c})
    with pytest.raises(InputError, match=r"changes head\.weight, which .* does not hold as codes"):
        kilodelta.merge(graph, delta, tmp_path / "out.onnx")
    other = grids.matmul_graph(tmp_path / "n.onnx", {"c.weight": Numbers(16, 64, 32, seed=4)})
    with pytest.raises(BaseMismatchError, match="scales or zero points are others"):
        kilodelta.merge(other, made(place), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_an_update_below_the_grid_fails_loudly(base: Path, tmp_path: Path) -> None:
    made(base, size=0.001).save(tmp_path / "small.kd")
    with pytest.raises(QualityError) as caught:
        kilodelta.merge(base, tmp_path / "small.kd", tmp_path / "out")
    assert "changes 0 of 1792 codes (0 %)" in caught.value.what
    assert caught.value.what.endswith("The result would be the base")
    made(base).save(tmp_path / "large.kd")
    with pytest.raises(QualityError, match=r"changes \d+ of 1792 codes .* rounds away\. 99 % are"):
        kilodelta.merge(base, tmp_path / "large.kd", tmp_path / "large", min_changed=0.99)
    assert "of a step of the grid on average" in caught.value.what
    assert "--min-changed 0" in caught.value.fix
    assert not (tmp_path / "out").exists()
    out = str(tmp_path / "out")
    command = ["merge", str(base), str(tmp_path / "small.kd"), "-o", out]
    assert CliRunner().invoke(main, command).exit_code == QualityError.exit_code
    shown = CliRunner().invoke(main, [*command, "--min-changed", "0"])
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.output.split())
    assert "in the grid: 0 of 1792 codes changed (0 %)" in said
    assert "64 weights have a step of zero" in said


@pytest.mark.parametrize("what", ["scale", "zero", "group", "code", "norm", "bits", "missing"])
def test_another_grid_is_refused_naming_what_differs(file: Path, tmp_path: Path, what: str) -> None:
    n = Numbers(16, 64, 32, zeros=True)
    config, norm, said = ASYMMETRIC, dict(NORM), "its scales or zero points are others"
    if what == "scale":
        n.scales[3, 1] *= 2
    elif what == "zero":
        n.zeros[3, 1] ^= 1
    elif what == "code":
        n.codes[3, 1] ^= 1
        said = "its scales are the base's, but its codes are others"
    elif what == "group":
        n.group, n.scales, n.zeros = 16, n.scales.repeat(2, 1), n.zeros.repeat(2, 1)
        said = "its grids are int4 1x16, int4 1x32; the base's int4 1x32"
    elif what == "norm":
        norm = {"norm.weight": np.full(8, 2, np.float32)}
        said = "tensors that are not quantised differ"
    elif what == "bits":
        n, config = Numbers(16, 64, 32, zeros=True, bits=8), ASYMMETRIC
        config = grids.ct_config(symmetric=False, num_bits=8)
        said = "its grids are int8 1x32"
    tensors = {**grids.pack_quantized("a", n, zeros=True), **norm}
    if what == "missing":
        said = "it has 1 quantised weights, the base 2"
    elif what == "bits":
        other = Numbers(24, 32, 32, zeros=True, bits=8)
        tensors |= grids.pack_quantized("b", other, zeros=True)
    else:
        tensors |= grids.pack_quantized("b", B, zeros=True)
    if what == "group":
        groups = {
            name: {
                "targets": [name],
                "weights": {"num_bits": 4, "group_size": size, "symmetric": False},
            }
            for name, size in (("a", 16), ("b", 32))
        }
        config = {"quant_method": "compressed-tensors", "config_groups": groups}
    place = grids.folder(tmp_path / "other", config, tensors)
    with pytest.raises(BaseMismatchError, match=said):
        kilodelta.merge(place, file, tmp_path / "out")
    with pytest.raises(BaseMismatchError, match=said):
        prove(place, file)
    assert not (tmp_path / "out").exists()


def test_a_float_base_and_a_quantised_one_are_told_apart(
    base: Path, file: Path, tmp_path: Path
) -> None:
    floats = {"a.weight": A.values().astype(np.float32), "b.weight": B.values().astype(np.float32)}
    place = grids.folder(tmp_path / "float", None, {**floats, **NORM})
    for call in (
        lambda: kilodelta.merge(place, file, tmp_path / "out"),
        lambda: prove(place, file),
        lambda: kilodelta.load(file, base=place),
    ):
        with pytest.raises(BaseMismatchError, match=r"was made for a quantised base, and .* is no"):
            call()
    with pytest.raises(BaseMismatchError, match="is none, but a part of one") as e:
        kilodelta.merge(base / "model.safetensors", file, tmp_path / "out")
    assert str(base) in e.value.fix
    with pytest.raises(KiloDeltaError, match="absent cannot be opened"):
        kilodelta.merge(tmp_path / "absent", file, tmp_path / "out")
    rng, lora = np.random.default_rng(1), Lora(rank=1)
    values = {
        name: quantise_target(
            lora, {"A": rng.normal(size=(1, w.shape[1])), "B": rng.normal(size=(len(w), 1))}, 8
        )
        for name, w in floats.items()
    }
    delta = build(place, Recipe(method=lora, patterns=PATTERNS, name="float"), values)
    assert "grid" not in json.loads(delta.manifest.text())
    with pytest.raises(
        BaseMismatchError, match=r"is a quantised model, and the file was made for a float"
    ) as e:
        kilodelta.merge(base, delta, tmp_path / "out")
    assert "rebase" in e.value.fix
    assert not (tmp_path / "out").exists()
    alike = {**grids.awq("a", A), **grids.awq("b", B), **NORM}
    awq = open_quantised(grids.folder(tmp_path / "awq", grids.AWQ, alike))
    with pytest.raises(InputError, match="was quantised by AWQ, which scales columns"):
        rebased(delta, awq)
    rebased(kilodelta.load(file), awq)  # made for the same numbers
    on_grid, _ = rebased(delta, open_quantised(base))
    assert on_grid.manifest.base.name == "float"
    assert np.array_equal(on_grid.blob, delta.blob)
    kilodelta.merge(base, on_grid, tmp_path / "out")
    prove(base, on_grid, tmp_path / "out")


def test_the_update_beside_the_base_has_a_root_of_its_own(base: Path, file: Path) -> None:
    delta = kilodelta.load(file, base=base)
    digests = b""
    for name, target in delta.targets.items():
        (out, in_), (c, e) = target.matrix, delta.scale(name)
        head = f"kilodelta update 1\0{name}\0{out},{in_}\0{e}\0".encode()
        numbers = b"".join(
            (int(q) * c).to_bytes(8, "little", signed=True) for q in delta.expand(name).flat
        )
        digests += hashlib.sha256(head + numbers).digest()
    assert delta.manifest.beside == "sha256:" + hashlib.sha256(digests).hexdigest()
    assert delta.manifest.beside != delta.manifest.result


def test_inspect_says_what_the_base_is(file: Path) -> None:
    found = kilodelta.inspect(file)
    assert found.grid is not None
    assert (found.grid["weights"], found.grid["kinds"]) == (2, ("int4 1x32",))
    assert 0.3 < float(found.made["grid_codes_changed"]) < 0.9
    shown = CliRunner().invoke(main, ["inspect", str(file)]).output
    for text in ("2 weights, int4 1x32", found.grid["logical"], found.beside, "grid_update_steps"):
        assert text in shown
    table = json.loads(CliRunner().invoke(main, ["inspect", str(file), "--json"]).stdout)
    assert table["grid"]["kinds"] == ["int4 1x32"]


@pytest.mark.parametrize("field", ["result", "beside"])
def test_a_result_that_does_not_come_out(
    base: Path, file: Path, tmp_path: Path, field: str
) -> None:
    delta = kilodelta.load(file)
    root: Any = "sha256:" + "0" * 64
    wrong = replace(delta, manifest=replace(delta.manifest, **{field: root}))
    with pytest.raises(ProofError, match="have root"):
        prove(base, wrong)
    if field == "result":
        with pytest.raises(ProofError, match="have root"):
            kilodelta.merge(base, wrong, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_changed_code_of_the_merged_model_is_named(
    base: Path, file: Path, tmp_path: Path
) -> None:
    kilodelta.merge(base, file, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    _, entry = kilodelta.Checkpoint.open(path).entry("b.weight_packed")
    data[entry.begin + 5] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ProofError, match=r"changed: b\.weight"):
        prove(base, file, tmp_path / "out")


def test_threads_and_shards_change_nothing(base: Path, file: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        kilodelta.merge(base, file, tmp_path / str(threads), threads=threads)
    one, three = (tmp_path / n / "model.safetensors" for n in ("1", "3"))
    assert one.read_bytes() == three.read_bytes()


@pytest.mark.parametrize("tensor", ["b.weight_packed", "b.weight_scale", "norm.weight"])
def test_a_base_that_changes_while_it_is_merged_is_named(
    base: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    """Codes and scales are not hashed as they are stored: the result's root tells."""
    place = shutil.copytree(base, tmp_path / "base")

    def changing(checkpoint: kilodelta.Checkpoint, *rest: Any) -> Any:
        _, entry = checkpoint.entry(tensor)
        with (place / "model.safetensors").open("r+b") as weights:
            weights.seek(entry.begin + 3)
            byte = weights.read(1)[0]
            weights.seek(entry.begin + 3)
            weights.write(bytes([byte ^ 1]))
        return grid_stream(checkpoint, *rest)

    monkeypatch.setattr("kilodelta.export.merge.checkpoint.grid_stream", changing)
    with pytest.raises(BaseMismatchError, match=rf"{re.escape(tensor)} .* is not the base's"):
        kilodelta.merge(place, file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_plain_weights_and_extras_of_a_quantised_base(tmp_path: Path) -> None:
    """An embedding that is not quantised is merged as in a float model; a head is stored."""
    from kilodelta.files.tensor import RawTensor

    rng, lora = np.random.default_rng(2), Lora(rank=2)
    embed = rng.normal(size=(10, 6)).astype(ml_dtypes.bfloat16)
    tensors = {**grids.pack_quantized("a", A, zeros=True), "embed.weight": embed}
    place = grids.folder(tmp_path / "base", ASYMMETRIC, tensors)
    values = {
        name: quantise_target(
            lora, {"A": rng.normal(size=(2, in_)), "B": rng.normal(size=(out, 2)) / 8}, 8
        )
        for name, (out, in_) in {"a.weight": (16, 64), "embed.weight": (10, 6)}.items()
    }
    head = RawTensor.of(np.ones((3, 6), np.float32))
    recipe = Recipe(
        method=lora, patterns=Patterns(include=("*.weight",)), extras={"head.weight": head}
    )
    delta = build(place, recipe, values)
    assert delta.grid_targets == ("a.weight",)
    kilodelta.merge(place, delta, tmp_path / "out")
    wanted = (embed.astype(np.float32) + delta.update("embed.weight")).astype(ml_dtypes.bfloat16)
    found = kilodelta.Checkpoint.open(tmp_path / "out").raw("embed.weight")
    assert found.data.tobytes() == wanted.tobytes()
    prove(place, delta, tmp_path / "out")
    with pytest.raises(KiloDeltaError):
        prove(place, delta, place)


def test_nola_in_the_grid(base: Path, tmp_path: Path) -> None:
    rng, nola = np.random.default_rng(2), Nola(rank=2, bases=64)
    values = {
        name: quantise_target(nola, {"alpha": rng.normal(size=64), "beta": rng.normal(size=64)}, 8)
        for name in ("a.weight", "b.weight")
    }
    delta = build(base, Recipe(method=nola, patterns=PATTERNS, seed=9), values)
    kilodelta.merge(base, delta, tmp_path / "out", min_changed=0)
    old, new = (open_quantised(p).matrix("b.weight") for p in (base, tmp_path / "out"))
    assert np.array_equal(new.codes, by_fractions(delta, "b.weight", old))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("logical", "sha256:x", "grid.logical"),
        ("weights", 0, "grid.weights"),
        ("kinds", ["int9 1x32"], "grid.kinds"),
        ("kinds", [], "grid.kinds"),
        ("kinds", ["int4 1x32", "e2m1 1x16"], "grid.kinds"),
        ("kinds", ["int4 0x32"], "grid.kinds"),
        ("extra", 1, "unknown key 'extra'"),
    ],
)
def test_a_grid_that_breaks_a_rule(base: Path, field: str, value: Any, said: str) -> None:
    table = json.loads(made(base).manifest.text())
    assert manifests.parse(canonical.dumps(table)).grid is not None
    table["grid"][field] = value
    with pytest.raises(FileError, match=said):
        manifests.parse(canonical.dumps(table))


def test_a_result_beside_belongs_to_a_quantised_base(base: Path) -> None:
    table = json.loads(made(base).manifest.text())
    del table["grid"]
    with pytest.raises(FileError, match="unknown key 'beside'"):
        manifests.parse(canonical.dumps(table))


def test_the_rebase_command(base: Path, file: Path, tmp_path: Path) -> None:
    """Of a file for one quantised base the one for another, and what it says of its size."""
    n, m = Numbers(16, 64, 16, seed=8), Numbers(24, 32, 16, seed=9)
    tensors = {**grids.pack_quantized("a", n), **grids.pack_quantized("b", m), **NORM}
    other = grids.folder(tmp_path / "other", grids.ct_config(group_size=16), tensors)
    out = tmp_path / "other.kd"
    command = ["rebase", str(other), str(file), "-o", str(out)]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    assert "int4 1x16" in shown.output
    assert "% of 1792 codes change" in shown.output
    found = kilodelta.load(out)
    assert np.array_equal(found.blob, kilodelta.load(file).blob)
    kilodelta.merge(other, out, tmp_path / "merged")
    prove(other, out, tmp_path / "merged")
    again = CliRunner().invoke(main, [*command, "--name", "new"])
    assert again.exit_code == OutputError.exit_code
    table = json.loads(CliRunner().invoke(main, [*command, "--force", "--json"]).stdout)
    assert (table["codes"], table["kinds"]) == (1792, ["int4 1x16"])
    small = tmp_path / "small.kd"
    made(base, size=0.001).save(small)
    shown = CliRunner().invoke(main, ["rebase", str(other), str(small), "-o", str(out), "--force"])
    assert "almost no code changes" in " ".join(shown.output.split())
    new = str(tmp_path / "x")
    floats = grids.folder(tmp_path / "f", None, {"a.weight": np.ones((16, 64), np.float32)})
    refused = CliRunner().invoke(
        main, ["rebase", str(floats), str(file), "-o", str(tmp_path / "x")]
    )
    assert "holds no quantised model" in refused.output
    alien = grids.folder(tmp_path / "alien", grids.CT, grids.pack_quantized("z", n))
    config = grids.ct_config(group_size=16)
    (alien / "config.json").write_text(json.dumps({"quantization_config": config}))
    refused = CliRunner().invoke(main, ["rebase", str(alien), str(file), "-o", new])
    assert refused.exit_code == BaseMismatchError.exit_code
    assert not (tmp_path / "x").exists()
