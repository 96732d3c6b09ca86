"""Which layers an adapter targets: PEFT's rules, and layers of the files that it never sees."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

import kilodelta
from kilodelta.compress.adapters import import_adapter
from kilodelta.compress.adapters.peft.config import AdapterConfig
from kilodelta.compress.adapters.peft.targeting import is_targeted
from kilodelta.errors import BaseMismatchError, InputError, KiloDeltaError
from kilodelta.expressions import MAX_TEXT, SECONDS, Expressions
from tests.support import adapters, pico

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **options})


PATHS = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "layers.0.q_proj",
    "transformer.h.1.attn.c_attn",
    "model.layers.1.mlp.experts.0.w1",
    "encoder.layer.1.attention.output.dense",
    "vision.blocks.0.layers.1.q_proj",
    "q_proj",
    "my_q_proj",
    "lm_head",
    "model.embed_tokens",
)
SETTINGS: tuple[dict[str, Any], ...] = (
    {"target_modules": ["q_proj"]},
    {"target_modules": ["self_attn.q_proj", "c_attn"]},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": r"model\.layers\.(0|1)\..*q_proj|lm_head"},
    {"target_modules": ["q_proj"], "layers_to_transform": 0},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 10]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "w1", "dense"], "layers_to_transform": [0, 1]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "blocks"]},
    {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": ["h"]},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "dense"], "modules_to_save": ["attention", "embed_tokens"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"], "layers_to_transform": [1]},
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_targets_are_peft_s_own(settings: dict[str, Any]) -> None:
    theirs = lora(**settings)
    ours = AdapterConfig(where=Path("a"), values=settings, expressions=Expressions("a"))
    for path in PATHS:
        assert is_targeted(path, ours) == bool(check_target_module_exists(theirs, path)), path


def check(base: Path, kind: str, config: Any, tmp_path: Path, count: int) -> None:
    """Import an adapter and compare the merged weights with PEFT's."""
    wrapped = adapters.wrap(base, kind, config)
    folder = adapters.save(wrapped, tmp_path / "adapter")
    bits: dict[str, Any] = {"bits": 16} if config.peft_type == "LORA" else {}  # others stay floats
    done = import_adapter(folder, base, tmp_path / "task.kd", **bits)
    assert done.targets == count
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    theirs = adapters.merged(wrapped, tmp_path / "theirs")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-4), name


CHOICES: dict[str, tuple[dict[str, Any], int]] = {
    "layer-0": ({"target_modules": ["q_proj"], "layers_to_transform": 0}, 1),
    "layers": ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, 2),
    "excluded": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        3,
    ),
    "excluded-by-expression": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
        2,
    ),
    "targeted-and-saved": (
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
        2,
    ),
    "saved-norm": ({"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]}, 2),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_settings_that_choose_layers_are_obeyed(choice: str, tmp_path: Path) -> None:
    options, count = CHOICES[choice]
    base = pico.llama(tmp_path / "base", tied=False)
    check(base, "llama", lora(**options), tmp_path, count)


@pytest.mark.parametrize("method", ["vera", "randlora", "unilora"])
def test_other_methods_choose_layers_alike(method: str, tmp_path: Path) -> None:
    make: Any = {
        "vera": peft.VeraConfig,
        "randlora": peft.RandLoraConfig,
        "unilora": peft.UniLoraConfig,
    }[method]
    base = pico.llama(tmp_path / "base", tied=False)
    config = make(r=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    check(base, "llama", config, tmp_path, 2)


EXTRA_LAYERS: dict[str, str] = {
    "mtp": "mtp.layers.0.",
    "past-the-model-s": "model.layers.2.",
    "another-tower": "visual.blocks.1.",
}


@pytest.mark.parametrize("case", EXTRA_LAYERS)
def test_layers_that_transformers_does_not_build_are_no_targets(case: str, tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base", tied=False)
    tensors = load_file(base / "model.safetensors")
    more = {
        name.replace("model.layers.1.", EXTRA_LAYERS[case]): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    save_file({**tensors, **more}, base / "model.safetensors", {"format": "pt"})
    wrapped = adapters.wrap(base, "llama", lora(target_modules=["q_proj", "v_proj"]))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    import_adapter(folder, base, tmp_path / "task.kd", bits=16)
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    theirs = wrapped.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for name in tensors:
        assert torch.allclose(ours[name], theirs[name], atol=1e-4), name
    for name, tensor in more.items():
        assert torch.equal(ours[name], tensor), name


def test_a_layer_that_is_built_and_lacks_is_missed_by_name(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base", tied=False)
    folder = adapters.save(
        adapters.wrap(base, "llama", lora(target_modules=["q_proj"])), tmp_path / "adapter"
    )

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".1." in key]:
            del tensors[key]

    adapters.edit(folder, drop)
    with pytest.raises(BaseMismatchError, match=r"targets model\.layers\.1\.self_attn\.q_proj, bu"):
        import_adapter(folder, base, tmp_path / "task.kd")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("plain")
    base = pico.bert(root / "base")
    return base, adapters.save(
        adapters.wrap(base, "bert", lora(target_modules=["query"])), root / "adapter"
    )


LONG = "takes too long to match"
"""What is said once the time of a file's expressions is used up: here before the first one."""
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "late": ({"target_modules": r".*\.(query|key)"}, LONG),
    "late-in-ranks": ({"rank_pattern": {r".*\.(query|key)": 2}}, LONG),
    "late-in-saved": ({"modules_to_save": [r"class(ifier)?"]}, LONG),
    "open": ({"target_modules": "("}, r"has '\(', no regular expression"),
    "deep": ({"target_modules": "(" * 3000 + ")" * 3000}, "no regular expression"),
    "long": ({"target_modules": "a|" * MAX_TEXT}, "characters of expressions"),
    "no-text": ({"target_modules": 5}, "target_modules is 5"),
    "no-texts": ({"target_modules": ["query", 5]}, "target_modules is"),
    "excluded": ({"exclude_modules": {"a": 1}}, "exclude_modules is"),
    "saved": ({"modules_to_save": "classifier"}, "modules_to_save is 'classifier'"),
    "layers": ({"layers_to_transform": "0"}, "layers_to_transform is '0'"),
    "parameters": ({"target_parameters": "a"}, "target_parameters is 'a'"),
    "digits": ({"lora_alpha": 10**400}, "a number has 401 digits"),
    "alpha": ({"lora_alpha": 10**18, "r": 10**18}, r"lora_A.weight has shape"),
    "alphas": ({"alpha_pattern": {"query": 1e300}}, r"alpha of .* is 1e\+300"),
    "start": ({"init_lora_weights": ["pissa"]}, "init_lora_weights is"),
    "flag": ({"fan_in_fan_out": 1, "use_rslora": "yes"}, "use_rslora is 'yes'"),
    "bias": ({"ensure_weight_tying": "yes"}, "ensure_weight_tying is 'yes'"),
    "mapping": ({"auto_mapping": 5, "task_type": {"a": 1}, "r": 9}, "has shape"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_configuration_is_a_sentence_in_seconds(
    case: str, plain: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = plain
    settings, text = HOSTILE[case]
    if text == LONG:
        monkeypatch.setattr("kilodelta.expressions.SECONDS", 0.0)
    shutil.copytree(adapter, tmp_path / "copy")
    adapters.edit(tmp_path / "copy", **settings)
    began = time.process_time()
    with pytest.raises(KiloDeltaError, match=text):
        import_adapter(tmp_path / "copy", base, tmp_path / "task.kd")
    assert time.process_time() - began < 10
    assert not (tmp_path / "task.kd").exists()


def test_all_expressions_of_a_file_share_one_time(monkeypatch: pytest.MonkeyPatch) -> None:
    regex = pytest.importorskip("regex")
    limits: list[float] = []

    class Slow:
        def match(self, text: str, timeout: float) -> None:
            limits.append(timeout)
            began = time.process_time()
            while time.process_time() - began < 0.01:
                pass
            raise TimeoutError

    monkeypatch.setattr(regex, "compile", lambda pattern: Slow())
    expressions = Expressions("a")
    for _ in range(2):
        with pytest.raises(KiloDeltaError, match=LONG):
            expressions.covers("(a|b)+", "ab")
    assert limits[0] == SECONDS
    assert limits[1] <= SECONDS - 0.01


def test_a_large_configuration_is_refused(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    shutil.copytree(adapter, tmp_path / "copy")
    adapters.edit(tmp_path / "copy", target_modules=["query", "x" * (1 << 20)])
    with pytest.raises(
        KiloDeltaError, match=r"adapter_config\.json cannot be read: has more than 1048576"
    ):
        import_adapter(tmp_path / "copy", base, tmp_path / "task.kd")


@pytest.mark.parametrize("method", ["vera", "randlora", "unilora"])
def test_a_rank_that_no_tensor_proves_draws_nothing(
    method: str, plain: tuple[Path, Path], tmp_path: Path
) -> None:
    """A few bytes of configuration must not ask for a basis of gigabytes."""
    make: Any = {
        "vera": peft.VeraConfig,
        "randlora": peft.RandLoraConfig,
        "unilora": peft.UniLoraConfig,
    }[method]
    base, _ = plain
    config = make(r=4, target_modules=["query"])
    folder = adapters.save(adapters.wrap(base, "bert", config), tmp_path / "adapter")
    adapters.edit(folder, r=10**9)
    with pytest.raises(InputError, match=r"has shape|r is 1000000000"):
        import_adapter(folder, base, tmp_path / "task.kd")
