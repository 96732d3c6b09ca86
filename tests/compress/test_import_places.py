"""Where in a base an adapter's modules lie: towers, fronts, wrappers, names of other versions."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import kilodelta
from kilodelta.cli import main
from kilodelta.compress.adapters import import_adapter
from kilodelta.compress.adapters.architecture import AdaptedArchitecture, read_architecture
from kilodelta.compress.adapters.peft.keys import sort_keys
from kilodelta.compress.adapters.placing import Place, parse_prefix
from kilodelta.errors import BaseMismatchError, CheckpointError, InputError
from kilodelta.files.checkpoint import Checkpoint
from tests.support import adapters, pico

pytestmark = pytest.mark.filterwarnings("ignore")


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **options})


def changed(base: Path, file: Path, out: Path) -> dict[str, torch.Tensor]:
    """The tensors that a file changes, by name: merged minus base."""
    kilodelta.merge(base, file, out)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    return {n: after[n] - before[n] for n in before if not torch.equal(after[n], before[n])}


def clip(folder: Path, *, width: int = 16) -> CLIPModel:
    """A dual encoder; with a width of 16 both towers' layers have the same shapes."""
    small = {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "hidden_size": width, "vocab_size": 32, "projection_dim": 8}
    vision = {**small, "hidden_size": 16, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_an_adapter_of_one_of_two_towers_asks_which(tower: str, tmp_path: Path) -> None:
    model = clip(tmp_path / "base")
    wrapped = adapters.adapted(getattr(model, tower), lora(target_modules=["q_proj"]))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    with pytest.raises(InputError, match="fits in 2 places of") as error:
        import_adapter(folder, tmp_path / "base", tmp_path / "task.kd")
    assert f"--prefix {tower}" in error.value.fix
    assert not (tmp_path / "task.kd").exists()
    done = import_adapter(folder, tmp_path / "base", tmp_path / "task.kd", prefix=tower, bits=16)
    assert f"lie below {tower}" in done.notes[-1]
    found = changed(tmp_path / "base", tmp_path / "task.kd", tmp_path / "out")
    wanted = {f"{tower}.{path}.weight": u for path, u in adapters.updates(wrapped).items()}
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert torch.allclose(found[name], update, atol=1e-4)


def test_a_tower_is_found_by_its_shapes_where_they_tell(tmp_path: Path) -> None:
    model = clip(tmp_path / "base", width=12)
    wrapped = adapters.adapted(model.vision_model, lora(target_modules=["q_proj"]))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    import_adapter(folder, tmp_path / "base", tmp_path / "task.kd")
    delta = kilodelta.load(tmp_path / "task.kd", base=tmp_path / "base")
    assert {name.partition(".")[0] for name in delta.targets} == {"vision_model"}


def test_a_tower_is_found_by_its_layers_where_they_tell(tmp_path: Path) -> None:
    """Of two towers that fit, only one is adapted in all of its targets."""
    base = {
        f"{tower}.layers.{i}.q_proj.weight": torch.randn(8, 8)
        for tower, depth in (("long", 3), ("short", 2))
        for i in range(depth)
    }
    save_file(base, tmp_path / "base.safetensors")
    tower = torch.nn.Module()
    tower.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    for layer in tower.layers:
        layer.q_proj = torch.nn.Linear(8, 8, bias=False)
    wrapped = adapters.adapted(tower, lora(target_modules=["q_proj"]))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    import_adapter(folder, tmp_path / "base.safetensors", tmp_path / "task.kd")
    delta = kilodelta.load(tmp_path / "task.kd", base=tmp_path / "base.safetensors")
    assert sorted(delta.targets) == [f"short.layers.{i}.q_proj.weight" for i in range(2)]


def test_a_front_is_replaced_only_when_asked(tmp_path: Path) -> None:
    base = pico.bert_classifier(tmp_path / "base")
    wrapped = adapters.wrap(base, "bert_classifier", lora(target_modules=["query"]))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    adapters.renamed(folder, lambda key: key.replace(".bert.", ".model.roberta.", 1))
    adapters.edit(folder, auto_mapping=None)
    with pytest.raises(BaseMismatchError, match=r"has no tensor model\.roberta\.enc") as error:
        import_adapter(folder, base, tmp_path / "task.kd")
    assert "--prefix model.roberta=bert" in error.value.fix
    import_adapter(folder, base, tmp_path / "task.kd", prefix="model.roberta=bert", bits=16)
    found = changed(base, tmp_path / "task.kd", tmp_path / "out")
    for path, update in adapters.updates(wrapped).items():
        assert torch.allclose(found[f"{path}.weight"], update, atol=1e-4)


def test_a_prefix_that_leads_nowhere_says_what_was_looked_for(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    folder = adapters.save(
        adapters.wrap(base, "bert", lora(target_modules=["query"])), tmp_path / "adapter"
    )
    arguments = ["import", folder, "--base", base, "-o", tmp_path / "a.kd", "--prefix", "tower"]
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == BaseMismatchError.exit_code
    assert "looked for tower.encoder.layer.0.attention.self.query.weight" in " ".join(
        done.output.split()
    )


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("vision_model", Place(added="vision_model.")),
        ("vision_model.", Place(added="vision_model.")),
        ("bert=encoder.bert", Place(cut="bert.", added="encoder.bert.")),
        ("0.auto_model=", Place(cut="0.auto_model.")),
    ],
)
def test_prefixes_are_read_as_written(text: str, place: Place) -> None:
    assert parse_prefix(text) == place


@pytest.mark.parametrize(
    ("prefix", "error", "why"),
    [
        ("a=b=c", InputError, "--prefix 'a=b=c' has more than one ="),
        ("tower=bert", BaseMismatchError, "it does not begin with tower"),
    ],
)
def test_a_prefix_that_no_module_has_is_said_so(
    prefix: str, error: type[Exception], why: str, tmp_path: Path
) -> None:
    base = pico.bert(tmp_path / "base")
    folder = adapters.save(
        adapters.wrap(base, "bert", lora(target_modules=["query"])), tmp_path / "adapter"
    )
    with pytest.raises(error, match=why) as refused:
        import_adapter(folder, base, tmp_path / "a.kd", prefix=prefix)
    assert "None" not in str(refused.value)


@pytest.mark.parametrize("target", [r".*language_model.*q_proj", ["q_proj"]])
def test_names_that_transformers_changes_while_loading(target: Any, tmp_path: Path) -> None:
    """Files say language_model.model.layers, the model in memory model.language_model.layers."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            image_size=8, patch_size=4,
        ),
        text_config=LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2,
        ),
        image_token_index=30,
    )  # fmt: skip
    base = tmp_path / "base"
    LlavaForConditionalGeneration(config).save_pretrained(base)
    model = LlavaForConditionalGeneration.from_pretrained(base)
    wrapped = adapters.adapted(model, lora(target_modules=target))
    folder = adapters.save(wrapped, tmp_path / "adapter")
    import_adapter(folder, base, tmp_path / "task.kd", bits=16)
    found = changed(base, tmp_path / "task.kd", tmp_path / "out")
    theirs, before = (
        adapters.merged(wrapped, tmp_path / "theirs"),
        load_file(base / "model.safetensors"),
    )
    assert found.keys() == {n for n in before if not torch.equal(theirs[n], before[n])}
    for name, update in found.items():
        assert torch.allclose(update, theirs[name] - before[name], atol=1e-4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A base, an adapter, and its updates by the base's tensors."""
    root = tmp_path_factory.mktemp("bert")
    base = pico.bert(root / "base")
    wrapped = adapters.wrap(base, "bert", lora(target_modules=["query", "value"]))
    folder = adapters.save(wrapped, root / "adapter")
    return base, folder, {f"{path}.weight": u for path, u in adapters.updates(wrapped).items()}


ROOT = "base_model.model."
DRESSES: dict[str, Any] = {
    "compiled": lambda key: "_orig_mod." + key,
    "compiled-inside": lambda key: key.replace(ROOT, f"{ROOT}_orig_mod."),
    "half-compiled": lambda key: key if ".0." in key else "_orig_mod." + key,
    "fsdp": lambda key: key.replace(".layer.0.", ".layer.0._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace(".layer.1.", ".layer.1._checkpoint_wrapped_module."),
    "ddp": lambda key: "module." + key,
    "no-root": lambda key: key.removeprefix(ROOT),
    "half-rooted": lambda key: key.removeprefix(ROOT) if "value" in key else key,
    "named": lambda key: key.replace(".weight", ".default.weight"),
    "named-otherwise": lambda key: key.replace(".weight", ".my adapter.weight"),
    "in-a-bigger-model": lambda key: key.replace(ROOT, f"{ROOT}0.auto_model."),
}


@pytest.mark.parametrize("dress", DRESSES)
def test_names_that_other_tools_dress_up(
    dress: str, bert: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, adapter, updates = bert
    folder = copy_of(adapter, tmp_path)
    adapters.renamed(folder, DRESSES[dress])
    import_adapter(folder, base, tmp_path / "task.kd", bits=16)
    found = changed(base, tmp_path / "task.kd", tmp_path / "out")
    assert found.keys() == updates.keys()
    for name, update in updates.items():
        assert torch.allclose(found[name], update, atol=1e-4)


def copy_of(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place / "copy")
    return place / "copy"


KEY = f"{ROOT}encoder.layer.0.attention.self.query."
STRANGERS: dict[str, tuple[str, str]] = {
    "magnitude": (f"{KEY}lora_magnitude_vector", "has a tensor encoder.*lora_magnitude_vector"),
    "magnitude-weight": (f"{KEY}lora_magnitude_vector.weight", "lora_magnitude_vector.weight"),
    "another-part": (f"{KEY}lora_C.weight", "lora_C.weight"),
    "bias-of-a": (f"{KEY}lora_A.bias", "lora_A.bias"),
    "another-adapter": (f"{KEY}lora_A.other.weight", r"lora_A\.other\.weight.* mean one tensor"),
    "twice": (f"_orig_mod.{KEY}lora_A.weight", "mean one tensor of the adapter"),
    "another-method": (f"{KEY}vera_lambda_b", "belongs to another method than LORA"),
    "another-module": (f"{ROOT}nowhere.lora_A.weight", "has no tensor nowhere.weight"),
    "whole-adapter": (f"{ROOT}lora_A.weight", "no part of the update"),
    "unwanted-weight": (f"{ROOT}pooler.dense.weight", "nor in its modules_to_save"),
    "new-weight": (f"{ROOT}score.weight", "has a tensor score.weight"),
    "own-weight": (f"{KEY}base_layer.weight", "its own .*query.weight"),
    "nested": (f"{KEY}base_layer.lora_A.weight", "a wrapper around another one"),
    "no-adapter": ("optimizer.step", "has a tensor optimizer.step"),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_tensor_that_nobody_reads_is_refused_by_name(
    stranger: str, bert: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    base, adapter, _ = bert
    key, text = STRANGERS[stranger]
    folder = copy_of(adapter, tmp_path)
    adapters.edit(folder, lambda tensors: tensors.update({key: torch.randn(16, 16)}))
    with pytest.raises((InputError, CheckpointError, BaseMismatchError), match=text):
        import_adapter(folder, base, tmp_path / "task.kd")
    assert not (tmp_path / "task.kd").exists()


def test_a_weight_that_equals_the_base_s_is_no_stranger(
    bert: tuple[Path, Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """A dump of a whole training state holds the base's own tensors."""
    base, adapter, _ = bert
    folder = copy_of(adapter, tmp_path)
    state = load_file(base / "model.safetensors")
    extra = {
        f"{ROOT}pooler.dense.weight": state["pooler.dense.weight"],
        f"{KEY}base_layer.weight": state["encoder.layer.0.attention.self.query.weight"],
        f"{KEY}base_layer.bias": state["encoder.layer.0.attention.self.query.bias"].half().float(),
    }
    adapters.edit(folder, lambda tensors: tensors.update(extra))
    with pytest.raises(InputError, match=r"query\.base_layer\.bias.* nor in its modules_to_save"):
        import_adapter(folder, base, tmp_path / "task.kd")
    adapters.edit(folder, lambda tensors: tensors.pop(f"{KEY}base_layer.bias"))
    assert import_adapter(folder, base, tmp_path / "task.kd").extras == ()


class Headed(torch.nn.Module):
    """A head whose name begins as PEFT's parts do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(16, 16)
        self.lora_head = torch.nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.lora_head(self.body(x).relu())
        return y


def test_a_head_that_is_called_like_a_part_is_saved(tmp_path: Path) -> None:
    net = Headed()
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    config = lora(target_modules=["body"], modules_to_save=["lora_head"])
    wrapped = adapters.adapted(copy.deepcopy(net), config)
    folder = adapters.save(wrapped, tmp_path / "adapter")
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    done = import_adapter(folder, base, tmp_path / "task.kd", bits=16)
    assert done.extras == ("lora_head.bias", "lora_head.weight")
    kilodelta.merge(base, tmp_path / "task.kd", out)
    for name, tensor in wrapped.merge_and_unload().state_dict().items():
        assert torch.allclose(load_file(out)[name], tensor, atol=1e-4)


def test_a_saved_module_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    base = pico.bert_classifier(tmp_path / "base")
    config = lora(target_modules=["query"], modules_to_save=["classifier"])
    folder = adapters.save(adapters.wrap(base, "bert_classifier", config), tmp_path / "adapter")
    adapters.edit(folder, lambda tensors: tensors.pop(f"{ROOT}classifier.bias"))
    with pytest.raises(BaseMismatchError, match=r"has classifier\.bias in its modules_to_save"):
        import_adapter(folder, base, tmp_path / "task.kd")


def test_a_new_head_of_a_headless_base_opens_as_its_class(tmp_path: Path) -> None:
    """Forty classifiers over one encoder: the base's files are the encoder's alone."""
    base = pico.bert(tmp_path / "base")
    with adapters.quiet():
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
    config = lora(target_modules=["query"], task_type="SEQ_CLS")
    wrapped = adapters.adapted(model, config)
    folder = adapters.save(wrapped, tmp_path / "adapter")
    done = import_adapter(folder, base, tmp_path / "task.kd", bits=16)
    assert done.extras == ("classifier.bias", "classifier.weight")
    assert any("classifier.weight is new" in note for note in done.notes)
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        ours, theirs = opened(ids).logits, wrapped.eval()(ids).logits
    assert ours.shape == (1, 5)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_keys_are_sorted_by_what_they_are() -> None:
    keys = sort_keys(
        [
            "base_model.model.a.lora_embedding_A",
            "base_model.model.attn.base_layer.out_proj.lora_A.weight",
            "base_model.model.experts.base_layer.lora_B.weight",
            "base_model.model.head.modules_to_save.default.inner.bias",
            "base_model.model.head.original_module.bias",
            "base_model.model.head.modules_to_save.bias",
            "base_model.model.fc.base_layer.bias",
        ],
        "LORA",
    )
    assert [(m.path, m.depth, m.owner) for m in keys.modules] == [
        ("a", 0, "a"),
        ("attn.out_proj", 0, "attn"),
        ("experts", 1, "experts"),
    ]
    assert set(keys.whole) == {"head.inner.bias", "head.bias", "fc.bias"}
    assert keys.replaced == ("base_model.model.head.original_module.bias",)


def test_an_architecture_tells_names_kinds_ties_and_stacks(tmp_path: Path) -> None:
    base = Checkpoint.open(pico.gpt2(tmp_path / "base"))
    found = read_architecture(base, {})
    assert found.ties == (("transformer.wte.weight", "lm_head.weight"),)
    assert found.names["lm_head.weight"] == found.names["transformer.wte.weight"]
    assert found.kind("transformer.h.0.attn.c_attn") == "conv1d"
    assert found.kind("transformer.wte") == "embedding"
    assert found.kind("nowhere") == ""
    assert not found.is_adapted
    headed = read_architecture(base, {"task_type": "SEQ_CLS"})
    assert (type(headed.module).__name__, headed.ties) == ("GPT2ForSequenceClassification", ())
    named = {"auto_mapping": {"base_model_class": "GPT2Model"}}
    assert "h.0.attn.c_attn.weight" in read_architecture(base, named).names
    other = {"auto_mapping": {"base_model_class": "BertModel"}, "task_type": 7}
    assert type(read_architecture(base, other).module).__name__ in ("GPT2LMHeadModel", "BertModel")


def test_a_base_without_a_configuration_is_what_its_names_say(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2, 2)}, tmp_path / "base.safetensors")
    found = read_architecture(Checkpoint.open(tmp_path / "base.safetensors"), {})
    assert isinstance(found, AdaptedArchitecture)
    assert (dict(found.names), found.module, found.ties) == ({"a.weight": "a.weight"}, None, ())


def test_a_configuration_beside_another_model_s_file_is_not_believed(tmp_path: Path) -> None:
    pico.bert(tmp_path / "base")
    place = tmp_path / "base" / "other.safetensors"
    save_file({"a.weight": torch.zeros(2, 2)}, place)
    assert read_architecture(Checkpoint.open(place), {}).module is None
    own = Checkpoint.open(tmp_path / "base" / "model.safetensors")
    assert read_architecture(own, {}).module is not None


def test_no_code_of_a_model_folder_is_run(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    (base / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    assert read_architecture(Checkpoint.open(base), {}).module is None
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 2, "n_routed_experts": 10**8},
        {"text_config": {"num_hidden_layers": 10**7}},
        {"vision_config": {"depths": [10**6, 10**6]}},
        {"num_labels": 10**9},
    ],
)
def test_a_configuration_that_asks_for_millions_of_layers_builds_none(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base = pico.bert(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **settings}))
    assert read_architecture(Checkpoint.open(base), {}).module is None


@pytest.mark.parametrize("text", ["", "[", "5", '{"architectures": 5, "model_type": "bert"}'])
def test_a_configuration_of_any_text_is_no_traceback(text: str, tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    (base / "config.json").write_text(text)
    found = read_architecture(Checkpoint.open(base), {})
    assert "encoder.layer.0.attention.self.query.weight" in found.names


def test_without_transformers_5_a_front_is_added_or_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Checkpoint.open(pico.bert(tmp_path / "base"))
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    name = "encoder.layer.0.attention.self.query.weight"
    assert read_architecture(base, {"task_type": "SEQ_CLS"}).names[f"bert.{name}"] == name
    headed = Checkpoint.open(pico.bert_classifier(tmp_path / "headed"))
    assert read_architecture(headed, {"task_type": "FEATURE_EXTRACTION"}).names[name] == (
        f"bert.{name}"
    )


def test_a_head_of_other_labels_travels_with_their_number(tmp_path: Path) -> None:
    base = pico.bert_classifier(tmp_path / "base", labels=3)
    with adapters.quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=5, ignore_mismatched_sizes=True
        )
    config = lora(target_modules=["query"], modules_to_save=["classifier"])
    wrapped = adapters.adapted(model, config)
    folder = adapters.save(wrapped, tmp_path / "adapter")
    import_adapter(folder, base, tmp_path / "task.kd", bits=16)
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "out")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(4, 12)[None]
    with torch.no_grad():
        assert torch.allclose(opened(ids).logits, wrapped.eval()(ids).logits, atol=1e-4)
    adapters.edit(
        folder, lambda tensors: tensors.update({f"{ROOT}classifier.bias": torch.zeros(3)})
    )
    with pytest.raises(BaseMismatchError, match=r"its own classifier\.weight \(5, 16\)"):
        import_adapter(folder, base, tmp_path / "other.kd")
