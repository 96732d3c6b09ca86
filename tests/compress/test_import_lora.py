"""PEFT LoRA, VeRA and Uni-LoRA adapters, trained by the real PEFT, as `.kd` files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kilodelta
from kilodelta.compress.adapters.conversion import convert_adapter
from kilodelta.compress.adapters.reader import ReadOptions
from kilodelta.compress.adapters.refactorise import candidates, quantise_product
from kilodelta.errors import BaseMismatchError, CheckpointError, InputError, KiloDeltaError
from kilodelta.export.peft.adapter import export_peft
from tests.support import pico

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set:UserWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Specified to not save vera_A:UserWarning",
    # PEFT takes the biases of its own lora_bias for damage.
    "ignore:Adapter .default.",
)


def trained(kind: str, base: Path, config: Any, folder: Path, *, size: float = 0.05) -> Any:
    """An adapter whose every trained tensor is random, saved by PEFT; returns the merged state."""
    model = getattr(transformers, kind).from_pretrained(base)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped.eval().merge_and_unload().state_dict()


def merged(kind: str, base: Path, file: Path, folder: Path) -> Mapping[str, Any]:
    kilodelta.merge(base, file, folder)
    found: Mapping[str, Any] = getattr(transformers, kind).from_pretrained(folder).state_dict()
    return found


def relative(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], before: Mapping[str, Any]
) -> float:
    """||ours - theirs|| over ||theirs - base||, over all tensors that the base has too."""
    missed = sum(float((ours[n].double() - theirs[n].double()).square().sum()) for n in theirs)
    moved = sum(float((theirs[n].double() - before[n].double()).square().sum()) for n in theirs)
    return float((missed / moved) ** 0.5)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "linear": ("bert", "AutoModel", {"target_modules": ["query", "dense"]}),
    "rank-stabilised": (
        "llama",
        "AutoModelForCausalLM",
        {"target_modules": "all-linear", "use_rslora": True},
    ),
    "conv1d": ("gpt2", "AutoModelForCausalLM", {"target_modules": ["c_attn", "c_proj"]}),
    "square-conv1d": ("gpt2", "AutoModelForCausalLM", {"target_modules": ["attn.c_proj"]}),
    "convolution": (
        "resnet",
        "AutoModelForImageClassification",
        {"target_modules": ["convolution"]},
    ),
    "embedding": (
        "bert",
        "AutoModel",
        {"target_modules": ["word_embeddings", "position_embeddings", "value"]},
    ),
    "patterns": (
        "bert",
        "AutoModel",
        {
            "target_modules": r".*\.(query|key)",
            "rank_pattern": {"key": 2, r"layer\.1\.attention\.self\.query": 7},
            "alpha_pattern": {"^encoder.layer.0.attention.self.key": 24},
        },
    ),
    "head": (
        "bert_classifier",
        "AutoModelForSequenceClassification",
        {"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"},
    ),
    "biases": ("bert", "AutoModel", {"target_modules": ["query"], "bias": "all"}),
    "own-bias": ("bert", "AutoModel", {"target_modules": ["query", "key"], "lora_bias": True}),
    # In the files these are vit.encoder.layer.*.attention.attention.query and intermediate.dense.
    "renamed": (
        "vit",
        "AutoModelForImageClassification",
        {
            "target_modules": ["q_proj", "fc1"],
            "modules_to_save": ["classifier"],
            "bias": "lora_only",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lora_adapter_becomes_a_delta_of_the_loss_it_says(case: str, tmp_path: Path) -> None:
    model, kind, options = CASES[case]
    base = pico.MODELS[model](tmp_path / "base")
    theirs = trained(kind, base, lora(**options), tmp_path / "lora")
    done = convert_adapter(
        tmp_path / "lora", base, tmp_path / "task.kd", options=ReadOptions(bits=16)
    )
    assert done.method["name"] == "lora"
    assert done.error < 3e-4
    ours = merged(kind, base, tmp_path / "task.kd", tmp_path / "merged")
    before = getattr(transformers, kind).from_pretrained(base).state_dict()
    # Both merges round once or twice, by 2^-24 of weights some 0.2 large; the update is 0.01.
    assert relative(ours, theirs, before) < done.error + 1e-5
    changed = [name for name in theirs if not torch.equal(theirs[name], before[name])]
    assert {name for name in ours if not torch.equal(ours[name], before[name])} <= set(changed)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_error_is_that_of_peft_s_own_merge(bits: int, tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    theirs = trained("AutoModel", base, lora(target_modules=["query"]), tmp_path / "lora")
    done = convert_adapter(
        tmp_path / "lora", base, tmp_path / "task.kd", options=ReadOptions(bits=bits)
    )
    ours = merged("AutoModel", base, tmp_path / "task.kd", tmp_path / "merged")
    before = transformers.AutoModel.from_pretrained(base).state_dict()
    assert relative(ours, theirs, before) == pytest.approx(done.error, rel=1e-3, abs=1e-6)
    assert done.error < {4: 0.2, 8: 0.02, 16: 1e-4}[bits]
    assert "the most is lost in encoder.layer." in done.notes[0]


def test_there_and_back_again(tmp_path: Path) -> None:
    """PEFT to .kd to PEFT: what comes out is what the .kd says, within float32."""
    base = pico.gpt2(tmp_path / "base")
    kind, config = "AutoModelForCausalLM", lora(target_modules=["c_attn", "c_proj", "c_fc"])
    theirs = trained(kind, base, config, tmp_path / "lora")
    done = convert_adapter(
        tmp_path / "lora", base, tmp_path / "task.kd", options=ReadOptions(bits=16)
    )
    back = export_peft(base, tmp_path / "task.kd", tmp_path / "back")
    assert back.error < 2.0**-23
    model = getattr(transformers, kind).from_pretrained(base)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "back")
    before = getattr(transformers, kind).from_pretrained(base).state_dict()
    again = wrapped.merge_and_unload().state_dict()
    assert relative(again, theirs, before) < done.error + 1e-5
    ours = merged(kind, base, tmp_path / "task.kd", tmp_path / "merged")
    assert relative(again, ours, before) < 1e-5


def test_ranks_that_differ_are_filled_up_and_said(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    config = lora(target_modules=["query", "key"], rank_pattern={"key": 1})
    trained("AutoModel", base, config, tmp_path / "lora")
    done = convert_adapter(tmp_path / "lora", base, tmp_path / "task.kd")
    assert done.method["rank"] == 4
    # Two keys of 16 x 16, three ranks each, at a byte a coefficient.
    assert any("192 bytes of it are zeros" in note for note in done.notes)


def test_no_factors_lose_more_than_the_adapter_s_own() -> None:
    rng = np.random.default_rng(2)
    B, A = rng.standard_t(3, size=(40, 6)), rng.uniform(-1, 1, (6, 30))
    for B_, A_ in candidates((B, A)):
        assert np.allclose(B_ @ A_, B @ A, rtol=0, atol=1e-12)
    for bits in (4, 8):
        best = quantise_product((B, A), 8, bits)
        plain = quantise_product_plain(B, A, bits)
        assert best.error < plain
        found = best.groups["B"].value @ best.groups["A"].value
        assert float(np.linalg.norm(found - B @ A)) == pytest.approx(best.error, rel=1e-9)
        assert float(np.linalg.norm(B @ A)) == pytest.approx(best.norm, rel=1e-12)


def quantise_product_plain(B: Any, A: Any, bits: int) -> float:
    from kilodelta.format.quantise import quantise

    product = quantise(B, bits).value @ quantise(A, bits).value
    return float(np.linalg.norm(product - B @ A))


def test_an_adapter_of_zeros_comes_in(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    trained("AutoModel", base, lora(target_modules=["query"]), tmp_path / "lora", size=0)
    done = convert_adapter(tmp_path / "lora", base, tmp_path / "task.kd")
    assert done.error == 0
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "merged")
    assert kilodelta.digest(tmp_path / "merged").root == kilodelta.digest(base).root


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"use_dora": True}, "use_dora is True, and DoRA rescales"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', and .* changed base"),
        ({"use_some_new_thing": {"a": 1}}, "use_some_new_thing is .* not known here"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"query": "4"}}, "the rank of .*query is '4'"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"rank_pattern": [4]}, "rank_pattern is"),
        ({"lora_alpha": "6"}, "lora_alpha is '6'"),
        ({"alpha_pattern": {"query": None}}, "alpha of .* is None"),
        ({"r": 5}, r"lora_A.weight has shape \(4, 16\), .* want \(5, 16\)"),
        ({"target_modules": ["query", "value"]}, "targets encoder.layer.0.attention.self.value"),
        ({"target_modules": ["key"]}, "holds tensors for encoder.layer.0.attention.self.query"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_is_not_obeyed_is_refused_by_name(
    options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    base = pico.bert(tmp_path / "base")
    trained("AutoModel", base, lora(target_modules=["query"]), tmp_path / "lora")
    place = tmp_path / "lora" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **options}))
    with pytest.raises(KiloDeltaError, match=text):
        convert_adapter(tmp_path / "lora", base, tmp_path / "task.kd")
    assert not (tmp_path / "task.kd").exists()


def edited(folder: Path, change: Any) -> Path:
    """An adapter's tensors changed by a function of the dictionary."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


KEY = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda t: t.pop(KEY), CheckpointError, KEY),
        (lambda t: t.update({KEY: t[KEY] * float("nan")}), InputError, f"{KEY} holds NaN"),
        (
            lambda t: t.update({KEY: t[KEY][:, :9].clone()}),
            InputError,
            rf"{KEY} has shape \(4, 9\)",
        ),
        (lambda t: t.update({KEY: t[KEY].long()}), CheckpointError, f"{KEY} is I64"),
    ],
    ids=["missing", "nan", "shape", "dtype"],
)
def test_a_damaged_adapter_names_its_tensor(
    change: Any, error: type[Exception], text: str, tmp_path: Path
) -> None:
    base = pico.bert(tmp_path / "base")
    trained("AutoModel", base, lora(target_modules=["query"]), tmp_path / "lora")
    edited(tmp_path / "lora", change)
    with pytest.raises(error, match=text):
        convert_adapter(tmp_path / "lora", base, tmp_path / "task.kd")
    assert not (tmp_path / "task.kd").exists()


def test_a_wrong_base_and_a_cut_file(tmp_path: Path) -> None:
    base, other = pico.bert(tmp_path / "base"), pico.llama(tmp_path / "other")
    trained("AutoModel", base, lora(target_modules=["query"]), tmp_path / "lora")
    with pytest.raises(BaseMismatchError, match=r"has no tensor encoder\.layer\.0"):
        convert_adapter(tmp_path / "lora", other, tmp_path / "task.kd")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"tensors end at byte|takes .* bytes"):
        convert_adapter(tmp_path / "lora", base, tmp_path / "task.kd")
    assert not (tmp_path / "task.kd").exists()


def test_a_base_whose_names_transformers_changes_is_still_checked(tmp_path: Path) -> None:
    """Renaming makes no stranger's base fit, nor an adapter that leaves some of its targets out."""
    kind, config = "AutoModelForImageClassification", lora(target_modules=["q_proj"])
    base, other = pico.vit(tmp_path / "base"), pico.bert(tmp_path / "other")
    trained(kind, base, config, tmp_path / "lora")
    with pytest.raises(BaseMismatchError, match=r"has no tensor vit\.layers\.0\.attention\.q_proj"):
        convert_adapter(tmp_path / "lora", other, tmp_path / "task.kd")
    place = tmp_path / "lora" / "adapter_config.json"
    options = {**json.loads(place.read_text()), "target_modules": ["q_proj", "k_proj"]}
    place.write_text(json.dumps(options))
    missing = r"base's vit\.encoder\.layer\.0\.attention\.attention\.key\.weight"
    with pytest.raises(BaseMismatchError, match=f"holds nothing for the {missing}"):
        convert_adapter(tmp_path / "lora", base, tmp_path / "task.kd")
    assert not (tmp_path / "task.kd").exists()


def test_an_embedding_that_is_not_the_base_s_is_refused(tmp_path: Path) -> None:
    """PEFT saves the whole weight of an embedding beside its factors."""
    base = pico.llama(tmp_path / "base", tied=False)
    config = lora(target_modules=["embed_tokens"])
    trained("AutoModelForCausalLM", base, config, tmp_path / "lora")
    done = convert_adapter(tmp_path / "lora", base, tmp_path / "task.kd")
    assert done.extras == ()
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    edited(tmp_path / "lora", lambda tensors: tensors.update({key: tensors[key] + 1}))
    with pytest.raises(BaseMismatchError, match=r"its own model.embed_tokens.weight"):
        convert_adapter(tmp_path / "lora", base, tmp_path / "other.kd")
    assert not (tmp_path / "other.kd").exists()


def test_a_bias_without_a_place_is_refused(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    trained("AutoModelForCausalLM", base, lora(target_modules=["q_proj"]), tmp_path / "lora")
    edited(
        tmp_path / "lora",
        lambda tensors: tensors.update(
            {k.replace("weight", "bias"): t[:, 0].clone() for k, t in tensors.items() if "_B" in k}
        ),
    )
    with pytest.raises(InputError, match=r"the base has no .*q_proj.bias"):
        convert_adapter(tmp_path / "lora", base, tmp_path / "task.kd")


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from kilodelta.cli import main

    base = pico.bert(tmp_path / "base")
    trained("AutoModel", base, lora(target_modules=["query"]), tmp_path / "lora")
    arguments = ["import", str(tmp_path / "lora"), "--base", str(base), "-o"]
    done = CliRunner().invoke(
        main, [*arguments, str(tmp_path / "task.kd"), "--json", "--bits", "4"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["source"], told["method"]["name"]) == ("PEFT LoRA", "lora")
    assert kilodelta.inspect(tmp_path / "task.kd").bits == 4
    shutil.rmtree(tmp_path / "lora")
    assert CliRunner().invoke(main, [*arguments, str(tmp_path / "b.kd")]).exit_code == 4


def vera(**options: Any) -> Any:
    return peft.VeraConfig(**{"r": 6, "projection_prng_key": 77, **options})


VERAS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "shapes": ("bert", "AutoModel", {"target_modules": ["query", "dense"]}),
    "conv1d": ("gpt2", "AutoModelForCausalLM", {"target_modules": ["c_attn", "c_proj"]}),
    "unsaved": ("bert", "AutoModel", {"target_modules": ["query"], "save_projection": False}),
    "high-rank": ("bert", "AutoModel", {"target_modules": ["query"], "r": 40}),
    "head": (
        "bert_classifier",
        "AutoModelForSequenceClassification",
        {"target_modules": ["value"], "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("case", VERAS)
def test_a_vera_adapter_keeps_its_vectors_and_draws_its_basis(case: str, tmp_path: Path) -> None:
    model, kind, options = VERAS[case]
    base = pico.MODELS[model](tmp_path / "base")
    theirs = trained(kind, base, vera(**options), tmp_path / "vera")
    done = convert_adapter(tmp_path / "vera", base, tmp_path / "task.kd")
    assert (done.method["name"], done.method["basis"]) == ("peft-vera", "drawn")
    assert done.error < 1e-6
    ours = merged(kind, base, tmp_path / "task.kd", tmp_path / "merged")
    before = getattr(transformers, kind).from_pretrained(base).state_dict()
    assert relative(ours, theirs, before) < 1e-5


def test_a_vera_basis_is_pytorch_s_bit_for_bit() -> None:
    from peft.tuners.vera.model import _kaiming_init

    from kilodelta.format.foreign.peft_vera import draw

    for seed, rank, height, width in ((0, 4, 9, 7), (77, 256, 130, 33), (2**40 + 5, 1, 2, 500)):
        generator = torch.Generator(device="cpu").manual_seed(seed)
        A = _kaiming_init((rank, width), generator)
        B = _kaiming_init((height, rank), generator)
        ours = draw(seed, rank, height, width)
        assert np.array_equal(ours[0], A.numpy())
        assert np.array_equal(ours[1], B.numpy())


def test_a_vera_file_cannot_ask_for_a_larger_basis_than_its_layers() -> None:
    from dataclasses import replace

    from kilodelta.format.foreign import PeftVera
    from kilodelta.format.targets import Target

    layout = (Target(name="w", dtype="F32", shape=(6, 5), transposed=False, index=0),)
    form = PeftVera(rank=2, basis="drawn", height=6, width=5, fingerprint="")
    assert form.problem(layout) == ""
    assert "6 x 4, the base's need 6 x 5" in replace(form, width=4).problem(layout)
    assert replace(form, height=1 << 24).problem(layout)
    assert replace(form, height=9, basis="stored").problem(layout) == ""


def test_a_vera_basis_that_its_key_does_not_draw_is_stored(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    trained("AutoModel", base, vera(target_modules=["query"]), tmp_path / "vera")
    drawn = convert_adapter(tmp_path / "vera", base, tmp_path / "drawn.kd")
    edited(tmp_path / "vera", lambda t: t["base_model.vera_A"].mul_(2))
    done = convert_adapter(tmp_path / "vera", base, tmp_path / "stored.kd")
    assert done.method["basis"] == "stored"
    assert done.error < 1e-6
    # A and B, 6 x 16 and 16 x 6 float32, travel in the file.
    assert done.nbytes["coefficients"] == drawn.nbytes["coefficients"] + 768
    edited(tmp_path / "vera", lambda t: t.pop("base_model.vera_A"))
    with pytest.raises(CheckpointError, match="vera_A"):
        convert_adapter(tmp_path / "vera", base, tmp_path / "other.kd")


def unilora(**options: Any) -> Any:
    return peft.UniLoraConfig(**{"r": 3, "theta_d_length": 40, "proj_seed": 9, **options})


UNILORAS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "order": ("bert", "AutoModel", {"target_modules": ["query", "key", "value", "dense"]}),
    "saved": ("bert", "AutoModel", {"target_modules": ["query", "dense"], "save_indices": True}),
    "conv1d": ("gpt2", "AutoModelForCausalLM", {"target_modules": ["c_attn", "c_proj"]}),
    "long": ("bert", "AutoModel", {"target_modules": ["query"], "theta_d_length": 1000}),
    "head": (
        "bert_classifier",
        "AutoModelForSequenceClassification",
        {"target_modules": ["value"], "modules_to_save": ["classifier"]},
    ),
}


@pytest.mark.parametrize("case", UNILORAS)
def test_a_unilora_adapter_keeps_its_vector_alone(case: str, tmp_path: Path) -> None:
    """Named modules come in another order than layers do: key before query before value."""
    model, kind, options = UNILORAS[case]
    base = pico.MODELS[model](tmp_path / "base")
    theirs = trained(kind, base, unilora(**options), tmp_path / "unilora")
    done = convert_adapter(tmp_path / "unilora", base, tmp_path / "task.kd")
    assert done.method["name"] == "peft-unilora"
    assert done.error < 1e-6
    length = options.get("theta_d_length", 40)
    assert done.nbytes["coefficients"] == 4 * length + 8 * done.targets
    ours = merged(kind, base, tmp_path / "task.kd", tmp_path / "merged")
    before = getattr(transformers, kind).from_pretrained(base).state_dict()
    assert relative(ours, theirs, before) < 1e-5


def test_unilora_indices_are_peft_s_own() -> None:
    from peft.tuners.unilora.model import UniLoraModel

    from kilodelta.format.foreign.peft_unilora import deal

    for total, bases, seed in ((100, 7, 0), (5, 9, 3), (64, 64, 42), (1001, 10, 2**33)):
        theirs = UniLoraModel.generate_index(total, bases, seed).numpy()
        assert np.array_equal(deal(seed, bases, total), theirs)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_modules": "all-linear"}, "target_modules is 'all-linear'"),
        ({"layers_to_transform": ["0"]}, r"layers_to_transform is \['0'\]"),
        ({"proj_seed": -1}, "proj_seed -1"),
        ({"theta_d_length": 41}, r"unilora_theta_d has shape \(40,\)"),
        ({"target_modules": ["nowhere"]}, "adapts no module"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_unilora_configuration_that_does_not_tell_its_layers(
    options: dict[str, Any], text: str, tmp_path: Path
) -> None:
    base = pico.bert(tmp_path / "base")
    trained("AutoModel", base, unilora(target_modules=["query"]), tmp_path / "unilora")
    place = tmp_path / "unilora" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **options}))
    with pytest.raises(InputError, match=text):
        convert_adapter(tmp_path / "unilora", base, tmp_path / "task.kd")
    assert not (tmp_path / "task.kd").exists()


def test_unilora_indices_of_another_making_are_refused(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    config = unilora(target_modules=["query"], save_indices=True)
    trained("AutoModel", base, config, tmp_path / "unilora")
    key = "base_model.model.encoder.layer.1.attention.self.query.unilora_indices_A"
    edited(tmp_path / "unilora", lambda t: t.update({key: t[key].flip(0).contiguous()}))
    with pytest.raises(InputError, match=r"saved for encoder.layer.1.* not those that"):
        convert_adapter(tmp_path / "unilora", base, tmp_path / "other.kd")


@pytest.mark.parametrize("config", ["vera", "unilora"])
def test_compatibility_forms_leave_as_lora_adapters(config: str, tmp_path: Path) -> None:
    """PEFT to .kd to PEFT, by another adapter than the one that came."""
    base = pico.bert(tmp_path / "base")
    made = {"vera": vera, "unilora": unilora}[config](target_modules=["query", "dense"])
    theirs = trained("AutoModel", base, made, tmp_path / config)
    convert_adapter(tmp_path / config, base, tmp_path / "task.kd")
    done = export_peft(base, tmp_path / "task.kd", tmp_path / "lora")
    assert done.error < 2.0**-23
    model = transformers.AutoModel.from_pretrained(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    again = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload()
    assert relative(again.state_dict(), theirs, before) < 1e-5
