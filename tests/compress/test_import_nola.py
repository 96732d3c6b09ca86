"""The official NOLA code's checkpoints in: its bases, its formula, its merge() that loses all."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import kilodelta
from kilodelta.compress.adapters.conversion import convert_adapter
from kilodelta.compress.adapters.official_nola.checkpoint import open_checkpoint
from kilodelta.compress.adapters.reader import ReadOptions
from kilodelta.errors import BaseMismatchError, CheckpointError, InputError
from kilodelta.format.foreign.torch_cpu import TorchCpu
from kilodelta.verify.digests.proof import prove
from tests.support import pico
from tests.support.nola_checkpoints import ALPHA, BASES, RANK, Layer, gpt2_case, llama_case

CPU = ReadOptions(drawn_on="cpu")


@pytest.mark.parametrize("seed", [0, 9_876_543_210, 2**32 + 1])
def test_a_cpu_basis_is_torchs_bit_for_bit(seed: int) -> None:
    torch.manual_seed(seed)
    theirs = torch.zeros(5, 11, 7).uniform_(-1.0, 1.0)
    assert np.array_equal(TorchCpu(seed).uniform((5, 11, 7), 1.0, "F32"), theirs.numpy())


def scalar_update(layer: Layer) -> Any:
    """The official formula as plain loops over Python floats."""
    factors = []
    for part in (layer.lora_A, layer.lora_B):
        rows, columns = part.weight.shape
        U = TorchCpu(int(part.seed)).uniform((BASES, rows, columns), 1.0, "F32").tolist()
        c, start = part.coefficients.tolist(), part.weight.tolist()
        factors.append(
            [
                [
                    start[y][x] + sum(c[i] * U[i][y][x] for i in range(BASES)) / math.sqrt(BASES)
                    for x in range(columns)
                ]
                for y in range(rows)
            ]
        )
    A, B = factors
    return np.array(
        [
            [ALPHA / RANK * sum(B[y][p] * A[p][x] for p in range(RANK)) for x in range(len(A[0]))]
            for y in range(len(B))
        ]
    )


def tolerance(update: Any, layer: Layer) -> float:
    """Factors rounded to float32 once here and a dozen times there (7 sums, 7 products, the
    division and the start); the product rounds 2 r times more: under 32 roundings of 2^-24 each,
    of sums of magnitudes that stay below r max|A| max|B| alpha / r."""
    tops = [float(part.factor().abs().max()) + 2.0 for part in (layer.lora_A, layer.lora_B)]
    return 32 * 2.0**-24 * ALPHA * tops[0] * tops[1]


def test_llama_updates_are_the_official_ones(tmp_path: Path) -> None:
    base, layers, folder = llama_case(tmp_path)
    done = convert_adapter(folder, base, tmp_path / "task.kd", options=CPU)
    assert done.method["name"] == "official-nola"
    assert done.error < 1e-6
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    assert set(delta.targets) == {f"{path}.weight" for path in layers}
    for path, layer in layers.items():
        ours = delta.update(f"{path}.weight")
        assert np.abs(ours - layer.update().numpy()).max() <= tolerance(ours, layer)
        assert np.abs(ours - scalar_update(layer)).max() <= tolerance(ours, layer)


def test_the_official_merge_loses_the_update_and_ours_does_not(tmp_path: Path) -> None:
    base, layers, folder = llama_case(tmp_path)
    before = load_file(base / "model.safetensors")
    convert_adapter(folder, base, tmp_path / "task.kd", options=CPU)
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for path, layer in layers.items():
        name = f"{path}.weight"
        # the official LLaMA merge(): lora_B.weight @ lora_A.weight, and lora_B.weight is zero
        official = before[name] + ALPHA / RANK * (layer.lora_B.weight @ layer.lora_A.weight)
        assert torch.equal(official, before[name])
        wanted = before[name] + layer.update()
        assert (wanted - before[name]).abs().max() > 0.1
        assert (after[name] - wanted).abs().max() <= tolerance(wanted, layer) + 2.0**-21
    assert prove(base, tmp_path / "task.kd", tmp_path / "out").targets == 4


@pytest.mark.parametrize("mlp", [True, False])
def test_gpt2_updates_query_and_value_of_the_fused_layer(tmp_path: Path, mlp: bool) -> None:
    base, layers, file = gpt2_case(tmp_path, mlp=mlp)
    convert_adapter(
        file, base, tmp_path / "task.kd", options=ReadOptions(drawn_on="cpu", alpha=ALPHA)
    )
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "out"))
    front = "" if "h.0.attn.c_attn.weight" in before else "transformer."
    for i in range(2):
        fused = f"{front}h.{i}.attn.c_attn.weight"
        query, key, value = torch.split((after[fused] - before[fused]).T, 16)
        assert torch.equal(key, torch.zeros(16, 16))
        for part, found in (("nola_query", query), ("nola_value", value)):
            layer = layers[f"transformer.h.{i}.attn.{part}"]
            assert (found - layer.update()).abs().max() <= tolerance(found, layer) + 2.0**-21
        if mlp:
            name, layer = f"{front}h.{i}.mlp.c_fc.weight", layers[f"transformer.h.{i}.mlp.p1_nola"]
            found = (after[name] - before[name]).T
            assert (found - layer.update()).abs().max() <= tolerance(found, layer) + 2.0**-21
    assert prove(base, tmp_path / "task.kd", tmp_path / "out").targets == (6 if mlp else 2)


def factors_of(layers: dict[str, Layer]) -> dict[str, torch.Tensor]:
    return {
        f"{path}.lora_{side}": getattr(layer, f"lora_{side}").factor().contiguous()
        for path, layer in layers.items()
        for side in "AB"
    }


@pytest.mark.parametrize("case", [llama_case, gpt2_case])
def test_factors_from_a_gpu_become_an_exact_lora(tmp_path: Path, case: Any) -> None:
    base, layers, path = case(tmp_path)
    save_file(factors_of(layers), tmp_path / "factors.safetensors")
    options = ReadOptions(factors=str(tmp_path / "factors.safetensors"), alpha=ALPHA, bits=16)
    done = convert_adapter(path, base, tmp_path / "task.kd", options=options)
    assert done.method["name"] == "lora"
    assert 0 < done.error < 1e-3
    assert kilodelta.inspect(tmp_path / "task.kd").exact
    delta = kilodelta.load(tmp_path / "task.kd", base=base)
    if case is llama_case:
        for name, layer in layers.items():
            wanted = layer.update().numpy()
            found = delta.update(f"{name}.weight")
            assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (ReadOptions(), "does not say where its bases were drawn"),
        (ReadOptions(factors="factors.safetensors"), "disagree about model.layers.0"),
    ],
)
def test_what_a_file_cannot_say_is_asked_for(
    tmp_path: Path, options: ReadOptions, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, layers, folder = llama_case(tmp_path)
    monkeypatch.chdir(tmp_path)
    some = factors_of(layers)
    some.pop("model.layers.0.self_attn.q_proj.lora_A")
    save_file(some, tmp_path / "factors.safetensors")
    with pytest.raises(InputError, match=text):
        convert_adapter(folder, base, tmp_path / "task.kd", options=options)
    assert not (tmp_path / "task.kd").exists()


def test_a_checkpoint_saved_from_a_gpu_is_no_cpus(tmp_path: Path) -> None:
    from kilodelta.compress.adapters.official_nola.checkpoint import NolaCheckpoint
    from kilodelta.compress.adapters.official_nola.convert import _require_cpu

    found = NolaCheckpoint(
        path=Path("model.pt"), layers={}, alpha=1.0, device="cuda:0", fan_in_fan_out=False
    )
    with pytest.raises(InputError, match=r"saved from cuda:0: .* depend on the GPU model"):
        _require_cpu(found, CPU)


def test_alpha_is_asked_for(tmp_path: Path) -> None:
    base, _, file = gpt2_case(tmp_path)
    with pytest.raises(InputError, match="does not say alpha"):
        convert_adapter(file, base, tmp_path / "task.kd", options=CPU)


@pytest.mark.parametrize(
    ("key", "value", "error", "text"),
    [
        ("lora_B.seed", None, CheckpointError, "has no .*lora_B.seed"),
        (
            "lora_A.coefficients",
            torch.zeros(2, 2),
            CheckpointError,
            r"coefficients is float32 \(2, 2\)",
        ),
        ("lora_A.coefficients", torch.zeros(5), InputError, "number of bases differs"),
        ("lora_A.weight", torch.zeros(RANK, 9), BaseMismatchError, r"factors \(3, 9\)"),
        ("lora_A.weight", torch.zeros(2, 16), InputError, "rank differs"),
        ("lora_B.coefficients", torch.zeros(BASES).half(), InputError, "float16, or not finite"),
        ("lora_B.coefficients", torch.full((BASES,), torch.inf), InputError, "or not finite"),
    ],
)
def test_a_broken_checkpoint_is_refused(
    tmp_path: Path, key: str, value: Any, error: Any, text: str
) -> None:
    base, _, folder = llama_case(tmp_path)
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    name = f"base_model.model.model.layers.1.self_attn.v_proj.{key}"
    if value is None:
        state.pop(name)
    else:
        state[name] = value
    torch.save(state, folder / "adapter_model.bin")
    with pytest.raises(error, match=text):
        convert_adapter(folder, base, tmp_path / "task.kd", options=CPU)
    assert not (tmp_path / "task.kd").exists()


def test_a_place_that_is_no_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle names the device that a tensor was on; one bit turns the name into a tuple."""

    def load(path: Path, *, map_location: Any, weights_only: bool) -> Any:
        return {"x": map_location(None, "cpu"), "y": map_location(None, ("cpu",))}

    (tmp_path / "nola.pt").write_bytes(b"")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError, match="a tensor's device is a tuple, not a text"):
        open_checkpoint(tmp_path / "nola.pt")


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "owned").touch, ())

    base, _, folder = llama_case(tmp_path)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="it holds other Python objects than tensors"):
        convert_adapter(folder, base, tmp_path / "task.kd", options=CPU)
    assert not (tmp_path / "owned").exists()


def test_the_vit_variant_is_refused_with_a_reason(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    torch.save({"blocks.0.attn.q.nola_alpha": torch.ones(4)}, tmp_path / "vit.pt")
    with pytest.raises(InputError, match="ViT variant, which keeps neither its head's bias"):
        convert_adapter(tmp_path / "vit.pt", base, tmp_path / "task.kd", options=CPU)
