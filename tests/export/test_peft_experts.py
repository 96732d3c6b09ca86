"""PEFT's LoRA on experts that one parameter stacks: PEFT merges what we merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import kilodelta
from kilodelta.compress.adapters import import_adapter
from kilodelta.errors import ExportError
from kilodelta.export.peft.adapter import PeftOptions, export_peft
from kilodelta.format.methods import Lora, Nola
from kilodelta.format.targets import Patterns
from tests.support import pico
from tests.support.making import delta

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "head_dim": 8,
}
EXPERTS = {
    "gpt_oss": ("*experts.down_proj", "*experts.gate_up_proj"),  # stored (in, out)
    "granitemoe": ("*output_linear.weight", "*input_linear.weight"),  # (out, in), renamed
}


@pytest.fixture(scope="module", params=EXPERTS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.AutoConfig.for_model(request.param, **SIZES)
    place = tmp_path_factory.mktemp("experts") / request.param
    return pico.save(lambda: transformers.AutoModelForCausalLM.from_config(config), place)


def made(base: Path, method: Any, count: int) -> Any:
    """A delta of q_proj and of so many stacks; one of Granite's is read the other way round."""
    stacks = EXPERTS[base.name][:count]
    turned = stacks if base.name == "gpt_oss" else stacks[:1]
    include = ("*q_proj.weight", *stacks)
    patterns = Patterns(include=include, transposed=turned, stacked=stacks)
    return delta(base, method, patterns=patterns)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", [Lora(rank=2), Nola(rank=3, bases=20)], ids=["lora", "nola"])
def test_peft_merges_what_we_merge(method: Any, count: int, base: Path, tmp_path: Path) -> None:
    ours = made(base, method, count)
    done = export_peft(base, ours, tmp_path / "lora", PeftOptions(as_loaded=True))
    assert done.targets == 1 + 3 * count
    assert done.error < 1e-6
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == count
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
        theirs = wrapped.merge_and_unload().state_dict()
    kilodelta.merge(base, ours, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    before = transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = 0
    for name, tensor in merged.items():
        moved = (tensor - before[name]).norm()
        changed += bool(moved > 0)
        assert (theirs[name] - tensor).norm() <= 1e-5 * moved, name
    assert changed == 1 + count
    # and back again: the import reads what was written
    import_adapter(tmp_path / "lora", base, tmp_path / "again.kd", bits=16)
    kilodelta.merge(base, tmp_path / "again.kd", tmp_path / "again")
    twice, once = (load_file(tmp_path / n / "model.safetensors") for n in ("again", "merged"))
    for name, tensor in once.items():
        assert torch.allclose(twice[name], tensor, atol=1e-3)


def test_without_the_model_the_names_are_not_known(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"stacks the matrices .*\n.*--as-loaded"):
        export_peft(base, made(base, Lora(rank=2), 1), tmp_path / "lora")
