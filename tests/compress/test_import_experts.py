"""`target_parameters`: experts stacked in memory, which lie one by one or stacked in the files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import kilodelta
from kilodelta.compress.adapters import import_adapter
from kilodelta.errors import BaseMismatchError, InputError, KiloDeltaError
from tests.support import adapters, pico

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def mixtral(folder: Path) -> Path:
    return made(MixtralForCausalLM, MixtralConfig(**SMALL, num_local_experts=3), folder)


def qwen(folder: Path) -> Path:
    more = {"moe_intermediate_size": 20, "num_experts": 11, "num_experts_per_tok": 2, "head_dim": 8}
    return made(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SMALL, **more), folder)


GPT = {"num_local_experts": 2, "head_dim": 8}
SQUARE = {"intermediate_size": 16, "num_hidden_layers": 1}


def gptoss(folder: Path) -> Path:
    return made(GptOssForCausalLM, GptOssConfig(**SMALL, **GPT), folder)


def granite(folder: Path) -> Path:
    return made(GraniteMoeForCausalLM, GraniteMoeConfig(**SMALL, num_local_experts=3), folder)


def made(kind: Any, config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    return folder


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **options})


def adapter_of(base: Path, config: Any, folder: Path) -> Any:
    wrapped = adapters.adapted(AutoModelForCausalLM.from_pretrained(base), config)
    adapters.save(wrapped, folder)
    return wrapped


CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    # q_proj, and for each of 2 layers 3 experts of 3 matrices
    "mixtral": (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3"]}, 2 + 18),
    "mixtral-all-linear": (mixtral, {"target_modules": "all-linear"}, 8 + 18 + 2),
    "mixtral-router": (mixtral, {"target_modules": ["gate"]}, 2),
    "mixtral-one": (mixtral, {"target_parameters": ["mlp.experts.down_proj"]}, 6),
    "mixtral-rslora": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj"],
            "use_rslora": True,
            "rank_pattern": {r".*\.gate_up_proj": 5},
            "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 2},
        },
        2 + 12,
    ),
    # files that hold all experts in one tensor, as (in, out) and as (out, in)
    "gpt-oss": (
        gptoss,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        },
        2 + 8,
    ),
    "granite": (granite, {"target_parameters": ["experts.down_proj"], "target_modules": []}, 6),
    # experts by number, not by name: 10 comes behind 9
    "qwen": (qwen, {"target_modules": ["gate_proj", "up_proj", "down_proj"]}, 66),
}


@pytest.mark.parametrize("case", CASES)
def test_every_expert_gets_its_own_update(case: str, tmp_path: Path) -> None:
    make, options, count = CASES[case]
    base = make(tmp_path / "base")
    wrapped = adapter_of(base, lora(**options), tmp_path / "adapter")
    done = import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd", bits=16)
    assert done.targets == count
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    theirs = adapters.merged(wrapped, tmp_path / "theirs")
    before = load_file(base / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        moved = (tensor - before[name]).norm()
        assert (ours[name] - tensor).norm() <= 2e-3 * moved, name


def test_gate_and_up_are_not_padded_with_each_other_s_ranks(tmp_path: Path) -> None:
    """PEFT fuses w1 and w3 to one matrix of twice the rank, half of whose columns are zero."""
    base = mixtral(tmp_path / "base")
    with adapters.quiet():
        model = AutoModelForCausalLM.from_pretrained(base)
        wrapped = adapters.adapted(model, lora(target_modules=["w1", "w2", "w3"]))
    for name, parameter in wrapped.named_parameters():
        if "base_layer.lora_B" in name:  # (2 * 24, 6 * 3 experts), by rank, then expert
            parts = parameter.data.reshape(2, 24, 2, 3, 3)
            parts[0, :, 1] = parts[1, :, 0] = 0
    adapters.save(wrapped, tmp_path / "adapter")
    done = import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd", bits=16)
    assert done.method["rank"] == 3
    assert done.error < 1e-3


def test_square_experts_need_the_model_s_code(tmp_path: Path) -> None:
    """Which side of a square matrix is its input, the module says; a bare file does not."""
    base = made(GptOssForCausalLM, GptOssConfig(**{**SMALL, **GPT, **SQUARE}), tmp_path / "base")
    config = lora(target_parameters=["mlp.experts.down_proj"], target_modules=[])
    adapter_of(base, config, tmp_path / "adapter")
    import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd")
    bare = shutil.copy(base / "model.safetensors", tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="holds square matrices, and nothing tells"):
        import_adapter(tmp_path / "adapter", bare, tmp_path / "b.kd")


def test_a_part_of_the_experts_is_refused_by_name(tmp_path: Path) -> None:
    base = mixtral(tmp_path / "base")
    adapter_of(base, lora(target_modules=["w1", "w2", "w3"]), tmp_path / "adapter")
    inner = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(inner)]:
            del tensors[key]

    adapters.edit(tmp_path / "adapter", drop)
    with pytest.raises(KiloDeltaError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd")
    assert not (tmp_path / "task.kd").exists()


def test_an_adapter_of_each_expert_s_own_layer_is_one_of_transformers_4(tmp_path: Path) -> None:
    base = mixtral(tmp_path / "base")
    adapter_of(base, lora(target_modules=["q_proj"]), tmp_path / "adapter")
    tensors = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    factors: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    for name in (name for name in tensors if ".experts." in name):
        out, in_ = tensors[name].shape
        A, B = (torch.randn(s, generator=generator) * 0.1 for s in ((3, in_), (out, 3)))
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        factors |= {f"{key}A.weight": A, f"{key}B.weight": B}
        wanted[name] = 2 * B @ A
    adapters.edit(
        tmp_path / "adapter",
        lambda found: found.update(factors),
        target_modules=["q_proj", "w1", "w2", "w3"],
    )
    import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd", bits=16)
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, update in wanted.items():
        assert torch.allclose(after[name] - tensors[name], update, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_bare_matrix_is_adapted_as_its_layer_is(kind: str, tmp_path: Path) -> None:
    base = pico.MODELS[kind](tmp_path / "base")
    name = {"llama": "mlp.down_proj.weight", "bert": "intermediate.dense.weight"}[kind]
    wrapped = adapters.wrap(base, kind, lora(target_parameters=[name], target_modules=[]))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    import_adapter(folder, base, tmp_path / "task.kd", bits=16)
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    theirs = adapters.merged(wrapped, tmp_path / "theirs")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-4)


class Tables(torch.nn.Module):
    """A module with bare parameters; the second in memory is the first by name."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.nn.Module()
        self.block.zeta = torch.nn.Parameter(torch.randn(6, 5))
        self.block.alpha = torch.nn.Parameter(torch.randn(4, 6))


@pytest.mark.parametrize(("targets", "ok"), [(["zeta"], True), (["zeta", "alpha"], False)])
def test_parameters_whose_order_only_the_code_tells(
    targets: list[str], ok: bool, tmp_path: Path
) -> None:
    net = Tables()
    base = tmp_path / "base.safetensors"
    save_file({name: p.detach().clone() for name, p in net.state_dict().items()}, base)
    config = lora(target_parameters=[f"block.{name}" for name in targets], target_modules=[])
    wrapped = adapters.adapted(net, config)
    folder = adapters.save(wrapped, tmp_path / "adapter")
    if not ok:
        with pytest.raises((InputError, BaseMismatchError), match="only the model's code tells"):
            import_adapter(folder, base, tmp_path / "task.kd")
        return
    import_adapter(folder, base, tmp_path / "task.kd", bits=16)
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out.safetensors")
    theirs = wrapped.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "out.safetensors")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-4)


def test_an_expert_that_is_changed_twice_is_refused(tmp_path: Path) -> None:
    """By its own layer, as transformers 4 has it, and in the stack of transformers 5."""
    base = mixtral(tmp_path / "base")
    adapter_of(base, lora(target_modules=["w1", "w2", "w3"]), tmp_path / "adapter")
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w2.lora_"
    more = {f"{key}A.weight": torch.randn(3, 24), f"{key}B.weight": torch.randn(16, 3)}
    adapters.edit(tmp_path / "adapter", lambda found: found.update(more), target_modules=["w2"])
    with pytest.raises(InputError, match=r"experts\.1\.w2\.weight twice, as "):
        import_adapter(tmp_path / "adapter", base, tmp_path / "task.kd")
