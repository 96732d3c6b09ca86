"""GGUF files by Hugging Face's names: the values that transformers reads, and a whole fine-tune."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

import kilodelta
from kilodelta.device import release
from kilodelta.errors import CheckpointError, ExportError, InputError
from kilodelta.export import export
from kilodelta.export.options import Options
from kilodelta.export.quantised.checks import check_quantised, require_grids
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from kilodelta.grid import open_quantised
from kilodelta.grid.dequantise import float_folder
from kilodelta.grid.open import open_named
from kilodelta.grid.quantise import quantise_folder
from kilodelta.merging import build
from kilodelta.merging.rebase import rebase
from kilodelta.verify import verify
from kilodelta.verify.digests.proof import prove
from tests.support import gguf_models


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return gguf_models.write_gguf(folder / "base.gguf", gguf_models.model())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_values_are_those_of_the_model_in_blocks(tmp_path: Path, kind: str) -> None:
    import gguf
    from transformers import AutoModelForCausalLM

    decoder = gguf_models.model(kind)
    path = gguf_models.write_gguf(tmp_path / "m.gguf", decoder)
    with float_folder(open_named(path), beside=tmp_path / "x") as folder:
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    block = gguf.GGMLQuantizationType.Q4_1
    assert set(ours) == set(decoder.state_dict())
    for name, value in decoder.state_dict().items():
        wanted = value.numpy()
        if "_proj.weight" in name:
            wanted = gguf.quants.dequantize(gguf.quants.quantize(wanted, block), block)
        assert np.array_equal(ours[name].numpy(), wanted), name


def test_transformers_reads_the_same_values(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    given = {"gguf_file": base.name, "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(base.parent, **given).state_dict()
    with float_folder(open_named(base), beside=tmp_path / "x") as folder:
        ours: dict[str, Any] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@pytest.fixture(scope="module")
def made(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tuned model, and a file that `compress` made of it against the GGUF file."""
    from kilodelta.compress import Options, compress

    folder = tmp_path_factory.mktemp("tuned")
    with float_folder(open_named(base), beside=folder / "x") as floats:
        shutil.copytree(floats, folder / "tuned")
    place = folder / "tuned" / "model.safetensors"
    tensors = load_file(place)
    generator = torch.Generator().manual_seed(1)
    for name, value in tensors.items():
        if "_proj.weight" in name:
            value += 0.1 * torch.randn(value.shape, generator=generator)
    save_file(tensors, place)
    ids = np.random.default_rng(0).integers(3, gguf_models.WORDS, (40, 8))
    np.savez(folder / "ids.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    options = Options(method=Lora(rank=2), steps=4, batch=4, held_out=8, name="llama")
    compress(base, folder / "tuned", folder / "t.kd", inputs=folder / "ids.npz", options=options)
    return folder / "tuned", folder / "t.kd"


def test_a_file_made_against_gguf_has_the_names_of_the_tuned_model(
    base: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    delta = kilodelta.load(made[1], base=base)
    assert "model.layers.0.self_attn.q_proj.weight" in delta.targets
    assert {"agreement.in-grid", "agreement.beside"} <= set(delta.manifest.made)
    assert delta.manifest.base.root == open_quantised(base).stored_identity().root
    done = kilodelta.merge(base, made[1], tmp_path / "merged.gguf")
    assert done.codes_changed > 0
    prove(base, made[1], tmp_path / "merged.gguf")
    before, after = open_named(base), open_named(tmp_path / "merged.gguf")
    for name in delta.targets:
        old, new = before.matrix(name), after.matrix(name)
        steps = np.abs(old.spread(old.steps))
        moved = new.values() - old.values() - delta.update(name)
        inside = (new.codes > new.kind.low) & (new.codes < new.kind.high)
        assert (np.abs(moved) <= 0.5 * steps + 1e-12)[inside].all(), name


def test_norms_that_are_stored_whole_take_their_place(
    base: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    delta, name = kilodelta.load(made[1], base=base), "model.layers.1.input_layernorm.weight"
    norm = RawTensor.of(np.arange(64, dtype=np.float32))
    manifest = replace(delta.manifest, extras=(name,))
    kept = replace(delta, manifest=manifest, extras={name: norm})
    kilodelta.merge(base, kept, tmp_path / "m.gguf")
    assert np.array_equal(open_named(tmp_path / "m.gguf").plain_raw(name).data, norm.data)
    prove(base, kept, tmp_path / "m.gguf")
    short = RawTensor.of(np.arange(32, dtype=np.float32))
    with pytest.raises(InputError, match=f"stores {name} whole .F32 .32.."):
        kilodelta.merge(base, replace(kept, extras={name: short}), tmp_path / "n.gguf")
    assert not (tmp_path / "n.gguf").exists()


def test_a_file_of_the_float_model_is_rebased_to_gguf(base: Path, tmp_path: Path) -> None:
    with float_folder(open_named(base), beside=tmp_path / "x") as floats:
        shutil.copytree(floats, tmp_path / "floats")
    lora, rng = Lora(rank=2), np.random.default_rng(2)
    name = "model.layers.1.self_attn.k_proj.weight"
    own = {"A": rng.normal(size=(2, 64)), "B": rng.normal(size=(32, 2))}
    recipe = build.Recipe(method=lora, patterns=Patterns(include=(name,)), bits=8)
    numbers = {name: build.quantise_target(lora, own, 8)}
    build.build(tmp_path / "floats", recipe, numbers).save(tmp_path / "f.kd")
    rebase(base, tmp_path / "f.kd", tmp_path / "g.kd")
    kilodelta.merge(base, tmp_path / "g.kd", tmp_path / "m.gguf", min_changed=0)
    prove(base, tmp_path / "g.kd", tmp_path / "m.gguf")
    assert kilodelta.load(tmp_path / "g.kd", base=base).update(name).any()


def test_the_files_own_names_still_fit(base: Path, tmp_path: Path) -> None:
    lora, rng = Lora(rank=2), np.random.default_rng(2)
    name = "blk.1.attn_k.weight"
    own = {"A": rng.normal(size=(2, 64)), "B": rng.normal(size=(32, 2))}
    recipe = build.Recipe(method=lora, patterns=Patterns(include=("*.attn_k.weight",)), bits=8)
    numbers = {n: build.quantise_target(lora, own, 8) for n in (name, "blk.0.attn_k.weight")}
    build.build(base, recipe, numbers).save(tmp_path / "g.kd")
    assert name in kilodelta.load(tmp_path / "g.kd", base=base).targets
    kilodelta.merge(base, tmp_path / "g.kd", tmp_path / "m.gguf", min_changed=0)
    prove(base, tmp_path / "g.kd", tmp_path / "m.gguf")


def test_an_architecture_that_is_not_known_is_refused(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma3")
    block = gguf.GGMLQuantizationType.Q4_1
    data = gguf.quants.quantize(np.ones((4, 32), np.float32), block)
    writer.add_tensor("blk.0.attn_q.weight", data, raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="of the architecture 'gemma3'"):
        open_named(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def exported(base: Path, made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("export") / "out"
    export(base, made[1], out, min_changed=0)
    return out


def test_an_export_holds_the_codes_and_minima_of_the_merge(
    base: Path, made: tuple[Path, Path], exported: Path, tmp_path: Path
) -> None:
    kilodelta.merge(base, made[1], tmp_path / "m.gguf", min_changed=0)
    merged, graph = open_named(tmp_path / "m.gguf"), open_quantised(exported / "model.fp32.onnx")
    assert set(graph.stored) == set(merged.stored)
    assert graph.identity().root == merged.identity().root
    assert all(graph.matrix(name).minima is not None for name in graph.stored)


def test_verify_runs_the_export(base: Path, made: tuple[Path, Path], exported: Path) -> None:
    inputs = made[1].parent / "ids.npz"
    found = verify(base, made[1], [exported], inputs=inputs, require=["ort"])
    assert found.failure is None, found.failure


@pytest.mark.slow
def test_an_export_with_a_cache_writes_what_the_merge_writes(
    base: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from kilodelta.verify.generation.writers import OnnxWriter

    export(base, made[1], tmp_path / "out", kv_cache=True, min_changed=0)
    kilodelta.merge(base, made[1], tmp_path / "m.gguf", min_changed=0)
    with float_folder(open_named(tmp_path / "m.gguf"), beside=tmp_path / "x") as folder:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    writer = OnnxWriter(tmp_path / "out" / "model.fp32.onnx")
    assert writer.available() is None
    for prompt in ([1, 5, 9], [1, 30, 7, 7, 12]):
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=2
        )
        written = [*prompt, *map(int, writer.write(prompt, 6, (2,)).chosen)]
        assert written == wanted[0].tolist()


def test_a_release_states_probes_of_both_ways(
    base: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    inputs = made[1].parent / "ids.npz"
    release(base, made[1], tmp_path / "r.kd", version=1, inputs=str(inputs))
    probes = kilodelta.load(tmp_path / "r.kd").probes
    assert {"output.logits", "beside.output.logits"} <= set(probes)


def test_a_model_with_minima_has_engines_by_a_symmetric_grid(
    base: Path, made: tuple[Path, Path], tmp_path: Path
) -> None:
    """Q4_1 has none; its values quantised anew do, and the file is rebased to them."""
    with pytest.raises(
        ExportError, match=r"has blocks with minima .* TensorRT takes neith"
    ) as error:
        check_quantised(open_named(base), kilodelta.load(made[1]), Options(capabilities=("sm89",)))
    assert "quantise_folder(BASE" in error.value.fix
    int4, task = tmp_path / "int4", tmp_path / "new.kd"
    quantise_folder(
        base, int4, "int4-g32", lambda name: name.endswith("_proj.weight"), scales="float16"
    )
    rebase(int4, made[1], task)
    merged = kilodelta.merge(int4, task, tmp_path / "merged", min_changed=0)
    assert merged.codes_changed > 0
    model = open_quantised(tmp_path / "merged")
    require_grids(model, ("float16",), ("sm89",), form="qdq")
