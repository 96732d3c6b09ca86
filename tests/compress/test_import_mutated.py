"""Real adapters of PEFT with something wrong: equal to PEFT's own merge, or refused by name.

Whatever is dropped, renamed, added or swapped in an adapter, its import must compute what PEFT
computes with the same files (or, where only names were dressed up, with the original ones), or
refuse with an error that names what is wrong. It must never be off, and never end in a traceback.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from kilodelta.compress.adapters.conversion import read_adapter
from kilodelta.compress.adapters.reader import ReadOptions
from kilodelta.errors import KiloDeltaError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.dtypes import FLOATS
from tests.support import adapters, pico

MUTANTS = 200

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Case:
    """An adapter, its base, and what PEFT makes of it."""

    name: str
    base: Path
    model: Any
    folder: Path
    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    merged: Mapping[str, np.ndarray[Any, Any]]


def mixtral(folder: Path) -> Path:
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **options})


CASES: dict[str, tuple[str, Any, Callable[[], Any]]] = {
    "lora": ("bert", AutoModel, lambda: lora(target_modules=["query", "value"])),
    "patterns": (
        "llama",
        AutoModelForCausalLM,
        lambda: lora(
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 2},
            alpha_pattern={"layers.1.self_attn.q_proj": 5},
            use_rslora=True,
        ),
    ),
    "head": (
        "bert_classifier",
        AutoModelForSequenceClassification,
        lambda: lora(target_modules=["key"], modules_to_save=["classifier"], bias="lora_only"),
    ),
    "conv1d": ("gpt2", AutoModelForCausalLM, lambda: lora(target_modules=["c_attn"])),
    "tied": (
        "llama",
        AutoModelForCausalLM,
        lambda: lora(target_modules=["v_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "experts": ("mixtral", AutoModelForCausalLM, lambda: lora(target_modules=["w1", "w2", "w3"])),
    "vera": (
        "bert",
        AutoModel,
        lambda: peft.VeraConfig(r=4, target_modules=["query"], projection_prng_key=5),
    ),
    "randlora": (
        "bert",
        AutoModel,
        lambda: peft.RandLoraConfig(r=5, randlora_alpha=10, target_modules=["query"]),
    ),
    "unilora": (
        "bert",
        AutoModel,
        lambda: peft.UniLoraConfig(
            r=2, theta_d_length=30, target_modules=["query"], save_indices=True
        ),
    ),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("cases")
    bases: dict[str, Path] = {}
    found = {}
    for name, (kind, auto, config) in CASES.items():
        if kind not in bases:
            make = mixtral if kind == "mixtral" else pico.MODELS[kind]
            bases[kind] = make(root / kind)
        with adapters.quiet():
            model = auto.from_pretrained(bases[kind]).eval()
            wrapped = adapters.adapted(copy.deepcopy(model), config(), size=0.05)
            folder = adapters.save(wrapped, root / name)
        found[name] = Case(
            name=name,
            base=bases[kind],
            model=model,
            folder=folder,
            tensors=adapters.tensors(folder),
            config=settings_of(folder),
            merged=merged_by_peft(wrapped),
        )
    return found


def settings_of(folder: Path) -> dict[str, Any]:
    """An adapter's configuration, its targets in order: PEFT writes them from a set, whose order
    follows the process's hash seed, and a mutant must be the same one in every process."""
    config: dict[str, Any] = json.loads((folder / adapters.CONFIG).read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    return config


def state_of(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A model's tensors by the names of its files, tied ones under each of their names."""
    from transformers.core_model_loading import revert_weight_conversion

    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    plain = revert_weight_conversion(model, state)
    return {name: tensor.double().numpy() for name, tensor in plain.items()}


def merged_by_peft(wrapped: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What PEFT's live adapter computes with. Its merge adds the update of a tied table once for
    each of the two layers that share it; the live layers add theirs once each."""
    table: Any = wrapped.get_input_embeddings()
    head: Any = None
    if hasattr(wrapped, "get_output_embeddings"):
        head = wrapped.get_output_embeddings()
    twice = None
    both = all(hasattr(layer, "get_delta_weight") for layer in (table, head))
    if both and table.base_layer.weight is head.base_layer.weight:
        twice = table.get_delta_weight("default").detach().clone()
    merged = wrapped.merge_and_unload()
    if twice is not None:
        merged.get_input_embeddings().weight.data -= twice
    return state_of(merged)


Tensors = dict[str, torch.Tensor]
Settings = dict[str, Any]
Mutation = Callable[[random.Random, Tensors, Settings], None]


def some(rng: random.Random, tensors: Tensors, what: str = "") -> str:
    return rng.choice(sorted(key for key in tensors if what in key) or sorted(tensors))


def module_of(key: str) -> str:
    return key.rsplit(".", 2)[0] if key.endswith("weight") else key.rpartition(".")[0]


def rename(tensors: Tensors, change: Callable[[str], str]) -> None:
    items = [(change(key), value) for key, value in tensors.items()]
    tensors.clear()
    tensors.update(items)


def drop(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    del tensors[some(rng, tensors)]


def drop_module(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    module = module_of(some(rng, tensors))
    for key in [key for key in tensors if module_of(key) == module]:
        del tensors[key]


def move(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    key = some(rng, tensors)
    tensors[rng.choice([key.replace("layer", "lair", 1), key + "s", key[1:]])] = tensors.pop(key)


def move_to_other_module(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    pairs = [("query", "key"), ("q_proj", "o_proj"), ("c_attn", "c_proj"), ("key", "value")]
    here = [pair for pair in pairs if any(f".{pair[0]}." in key for key in tensors)]
    old, new = here[0] if here else pairs[0]
    rename(tensors, lambda key: key.replace(f".{old}.", f".{new}.", 1))


def other_layer(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    key = some(rng, tensors, ".0.")
    tensors[key.replace(".0.", rng.choice([".1.", ".7."]), 1)] = tensors.pop(key)


def swap_values(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    first = some(rng, tensors)
    second = rng.choice([k for k in tensors if tensors[k].shape == tensors[first].shape])
    tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()


def reshape(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    key = some(rng, tensors)
    value = tensors[key]
    tensors[key] = rng.choice(
        [
            value.T.contiguous() if value.ndim == 2 else value[None],
            value[:-1].clone(),
            torch.empty(0),
            value.reshape(-1).clone(),
            torch.cat([value, value]),
        ]
    )


def retype(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    for key in list(tensors):
        if tensors[key].is_floating_point() and rng.random() < 0.7:
            tensors[key] = tensors[key].to(rng.choice([torch.float64, torch.bfloat16, torch.half]))


def spoil(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    key = some(rng, tensors)
    tensors[key] = tensors[key].clone()
    if tensors[key].is_floating_point():
        tensors[key].view(-1)[0] = rng.choice([float("nan"), float("inf")])


def scale(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    key = some(rng, tensors)
    if tensors[key].is_floating_point():
        tensors[key] = tensors[key] * rng.choice([0.0, -1.0, 3.0])


def add(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    key = some(rng, tensors)
    module, value = module_of(key), torch.randn(3, 16)
    name = rng.choice(
        [
            f"{module}.lora_magnitude_vector",
            f"{module}.lora_magnitude_vector.weight",
            f"{module}.lora_C.weight",
            f"{module}.lora_A.bias",
            f"{module}.lora_head.weight",
            f"{module}.weight",
            f"{module}.base_layer.weight",
            f"{module}.base_layer.lora_A.weight",
            "base_model.model.nowhere.lora_A.weight",
            "base_model.model.nowhere.weight",
            "base_model.model.lora_A.weight",
            "base_model.model.pooler.dense.weight",
            "base_model.model.lm_head.weight",
            "optimizer.step",
            "lora_A",
        ]
    )
    tensors.setdefault(name, value)


def add_adapter(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    key = some(rng, tensors, "_A")
    front, _, leaf = key.rpartition(".")
    name = f"{front}.other.{leaf}" if leaf in ("weight", "bias") else f"{key}.other"
    tensors[name] = torch.randn_like(tensors[key].float())


def name_adapter(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    """A dump of a training state: the adapter's name is in the keys."""

    def named(key: str) -> str:
        for leaf in (".weight", ".bias"):
            if "lora_" in key and key.endswith(leaf):
                return key.removesuffix(leaf) + ".default" + leaf
        return key + ".default" if "_embedding_" in key else key

    rename(tensors, named)


def strip_root(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    part = rng.choice(["", ".0.", "_A"])
    rename(tensors, lambda k: k.removeprefix("base_model.model.") if part in k else k)


def dress(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    part = rng.choice(["", ".0.", "_A"])
    front = rng.choice(["_orig_mod.", "module.", "_fsdp_wrapped_module."])
    rename(tensors, lambda k: front + k if part in k else k)


def dress_inside(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    inner = rng.choice(["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"])
    rename(tensors, lambda key: key.replace(".0.", f".0.{inner}.", 1))


def another_root(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    rename(tensors, lambda key: key.replace("base_model.model.", "base_model.model.encoder2.", 1))


def twice(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    key = some(rng, tensors)
    tensors[f"_orig_mod.{key}"] = tensors[key] + 1


def target(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    targets = config.get("target_modules")
    if isinstance(targets, list):
        other = rng.choice(["key", "k_proj", "c_proj", "dense", "lm_head", "nothing"])
        config["target_modules"] = rng.choice([targets[:1], [*targets, other], [], other])


def option(rng: random.Random, tensors: Tensors, config: Settings) -> None:
    name, value = rng.choice(
        [
            ("lora_alpha", 11),
            ("lora_alpha", 1.5),
            ("use_rslora", True),
            ("use_dora", True),
            ("r", 4),
            ("r", 10**30),
            ("lora_alpha", 10**400),
            ("fan_in_fan_out", True),
            ("layers_to_transform", 0),
            ("layers_to_transform", [0, 1]),
            ("exclude_modules", ["layer.0.attention.self.query"]),
            ("exclude_modules", r".*\.1\..*"),
            ("modules_to_save", ["pooler"]),
            ("modules_to_save", ["query"]),
            ("modules_to_save", None),
            ("bias", "all"),
            ("rank_pattern", {"query": 2}),
            ("rank_pattern", {"(": 2}),
            ("alpha_pattern", {"query": 2, "q_proj": 9}),
            ("ensure_weight_tying", True),
            ("target_parameters", ["mlp.down_proj.weight"]),
            ("layer_replication", [[0, 2], [0, 2]]),
            ("init_lora_weights", "pissa"),
            ("projection_prng_key", 6),
            ("randlora_alpha", 3),
            ("proj_seed", 7),
            ("theta_d_length", 31),
            ("sparse", True),
            ("peft_type", "LOHA"),
            ("trainable_token_indices", [1]),
            ("target_modules", r".*\.(query|q_proj|c_attn)"),
            ("target_modules", "(a|b)+$"),
        ]
    )
    config[name] = value


SAME: tuple[Mutation, ...] = (name_adapter, strip_root, dress, dress_inside, another_root)
"""These dress up names and change no meaning, although PEFT does not find such tensors."""
OTHER: tuple[Mutation, ...] = (
    drop,
    drop_module,
    move,
    move_to_other_module,
    other_layer,
    swap_values,
    reshape,
    retype,
    spoil,
    scale,
    add,
    add_adapter,
    twice,
    target,
    option,
    option,
    option,
)


def by_peft(case: Case, folder: Path) -> dict[str, np.ndarray[Any, Any]] | None:
    """What PEFT makes of a folder; None if it refuses."""
    try:
        with adapters.quiet():
            wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(case.model), folder)
            return merged_by_peft(wrapped)
    except Exception:  # PEFT's errors are of every kind
        return None


def by_import(case: Case, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What an import makes of a folder: the base's tensors with updates and extras."""
    base = Checkpoint.open(case.base)
    parsed = read_adapter(folder, base, ReadOptions(bits=16, basis_dtype="bfloat16"))
    state = state_of(case.model)
    for name in parsed.coefficients:
        shape = base.info(name).shape
        update = np.asarray(parsed.update(name))
        update = update.T if update.shape != shape and update.T.shape == shape else update
        if case.name == "conv1d" and "c_attn" not in name:
            update = update.T  # square
        state[name] = state[name] + update.reshape(shape)
    for name, tensor in parsed.recipe.extras.items():
        values = (
            FLOATS[tensor.dtype].widen(tensor.data) if tensor.dtype in FLOATS else tensor.values()
        )
        state[name] = np.float64(values).reshape(tensor.shape)
    if case.model.config.tie_word_embeddings and not parsed.recipe.config:
        table = state.get("model.embed_tokens.weight")
        if table is not None and "lm_head.weight" in state:
            state["lm_head.weight"] = table
    return state


def is_equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """float32 products of a few ranks, added to weights below 1."""
    return all(
        name in theirs
        and ours[name].shape == theirs[name].shape
        and bool(np.abs(ours[name] - theirs[name]).max(initial=0.0) < 3e-6)
        for name in ours
    )


@pytest.mark.parametrize("number", range(MUTANTS))
def test_a_mutated_adapter_is_right_or_refused_by_name(
    number: int, cases: dict[str, Case], tmp_path: Path
) -> None:
    rng = random.Random(number)
    case = cases[sorted(cases)[number % len(cases)]]
    tensors, config = dict(case.tensors), copy.deepcopy(dict(case.config))
    wrong = [rng.choice(OTHER)] if rng.random() < 0.8 else []
    dressed = [rng.choice(SAME)] if not wrong or rng.random() < 0.2 else []
    for mutate in wrong:
        mutate(rng, tensors, config)
    plain = written(case, tmp_path / "plain", tensors, config)
    for mutate in dressed:
        mutate(rng, tensors, config)
    try:
        ours = by_import(case, written(case, tmp_path / "mutant", tensors, config))
    except KiloDeltaError:  # anything else is a traceback
        return
    theirs = by_peft(case, plain) if wrong else case.merged
    assert theirs is not None, (case.name, wrong, dressed, "PEFT refuses")
    assert is_equal(ours, theirs), (case.name, wrong, dressed)


def written(case: Case, folder: Path, tensors: Tensors, config: Settings) -> Path:
    shutil.copytree(case.folder, folder)
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / adapters.WEIGHTS)
    (folder / adapters.CONFIG).write_text(json.dumps(config))
    return folder


def test_the_unchanged_adapters_are_right(cases: dict[str, Case]) -> None:
    for case in cases.values():
        assert is_equal(by_import(case, case.folder), case.merged), case.name
        moved = max(
            float(np.abs(case.merged[n] - v).max()) for n, v in state_of(case.model).items()
        )
        assert moved > 1e-3


@pytest.mark.parametrize(
    ("targets", "is_taken"),
    [
        (["v_proj"], False),  # PEFT leaves both tables unread
        (["lm_head", "v_proj"], True),
        (["embed_tokens", "v_proj"], True),
        (["model.embed_tokens"], False),
    ],
)
def test_tied_updates_count_only_where_one_of_the_two_is_targeted(
    targets: list[str], is_taken: bool, cases: dict[str, Case], tmp_path: Path
) -> None:
    case = cases["tied"]
    folder = written(
        case, tmp_path / "targets", dict(case.tensors), {**case.config, "target_modules": targets}
    )
    if not is_taken:
        with pytest.raises(KiloDeltaError, match=r"embed_tokens|lm_head|v_proj"):
            by_import(case, folder)
        return
    theirs = by_peft(case, folder)
    assert theirs is not None
    assert is_equal(by_import(case, folder), theirs)
