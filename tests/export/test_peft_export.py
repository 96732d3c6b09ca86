"""Deltas as PEFT LoRA adapters, opened by the real PEFT and compared with our own merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kilodelta
from kilodelta.errors import BaseMismatchError, ExportError, InputError, OutputError
from kilodelta.export.peft.adapter import PeftOptions, export_peft
from kilodelta.export.peft.factors import float_factors
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora, Method, Nola, RandLora, UniLora, Vera
from kilodelta.format.quantise import Quantised
from kilodelta.format.targets import Patterns
from kilodelta.merging import build
from tests.support import pico
from tests.support.making import delta, numbers, write
from tests.support.processes import BLOCKED, GOLDEN, run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings(
    # PEFT says so of every Conv1D, though the adapter's configuration says it too where it can.
    "ignore:fan_in_fan_out is set:UserWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
)

LOW = (
    Nola(rank=3, bases=130),
    Lora(rank=2),
    UniLora(rank=3, bases=50, anchor=9),
    Vera(rank=6),
)
ALL = Patterns(include=("*.weight",), exclude=("*norm*", "*Norm*"))
PLACES: dict[str, tuple[str, Patterns]] = {
    "bert": ("AutoModel", ALL),
    "gpt2": (
        "AutoModelForCausalLM",
        Patterns(include=("*.c_*.weight",), transposed=("*.c_*.weight",)),
    ),
    "llama": ("AutoModelForCausalLM", Patterns(include=("*_proj.weight",))),
    "vit": ("AutoModelForImageClassification", ALL),
    "resnet": ("AutoModelForImageClassification", Patterns(include=("*convolution.weight",))),
}


def opened(kind: str, base: Path, adapter: Path) -> Any:
    """The adapter on its base, by the real loader; a missing key would warn, and so fail."""
    model = getattr(transformers, kind).from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def products(wrapped: Any) -> dict[str, Any]:
    """|B| |A| of every target, by module path: how large the terms of its sums are."""
    found = {}
    for path, layer in wrapped.base_model.model.named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        with torch.no_grad():
            for factor in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
                factor.abs_()
            for factor in (*layer.lora_embedding_A.values(), *layer.lora_embedding_B.values()):
                factor.abs_()
            found[path] = layer.get_delta_weight("default").double().numpy()
    return found


def assert_equals_merge(
    kind: str, base: Path, adapter: Path, merged: Path, rank: int, ignore: str = "\0"
) -> None:
    """PEFT's merge against ours.

    With u = 2^-24: the two factors are rounded (2u), a sum of r products is off by at most r u of
    the sum of magnitudes, ours by u of the update, and both sums with W by u of the result.
    """
    sizes = products(opened(kind, base, adapter))
    assert sizes
    theirs = opened(kind, base, adapter).merge_and_unload().state_dict()
    ours = getattr(transformers, kind).from_pretrained(merged).state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        if name.startswith(ignore):
            continue
        terms = sizes.get(name.removesuffix(".weight"), 0.0)
        limit = 2.0**-24 * (1 + 2.0**-18) * ((rank + 3) * terms + 2 * np.abs(tensor.numpy()))
        limit = np.where(terms == 0, 0, limit)
        assert (np.abs(theirs[name].numpy() - tensor.numpy().astype(np.float64)) <= limit).all()


@pytest.mark.parametrize("model", PLACES)
@pytest.mark.parametrize("method", LOW, ids=lambda method: method.name)
def test_peft_merges_what_we_merge(model: str, method: Method, tmp_path: Path) -> None:
    kind, patterns = PLACES[model]
    base = pico.MODELS[model](tmp_path / "base")
    made = delta(base, method, patterns=patterns)
    # A ViT's modules have other names in transformers 5 than in files.
    options = PeftOptions(as_loaded=model == "vit")
    done = export_peft(base, made, tmp_path / "lora", options)
    kilodelta.merge(base, made, tmp_path / "merged")
    assert done.targets == len(made.targets)
    assert 0 <= done.error <= done.worst_error < 2.0**-23
    assert_equals_merge(kind, base, tmp_path / "lora", tmp_path / "merged", method.rank)
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_conv1d_is_known_by_its_model_where_the_delta_does_not_say(tmp_path: Path) -> None:
    """A square Conv1D taken for a Linear would load, and be transposed."""
    base = pico.gpt2(tmp_path / "base")
    made = delta(base, Lora(rank=2), patterns=Patterns(include=("*.c_proj.weight",)))
    assert {target.transposed for target in made.targets.values()} == {False}
    export_peft(base, made, tmp_path / "lora")
    kilodelta.merge(base, made, tmp_path / "merged")
    assert_equals_merge(
        "AutoModelForCausalLM", base, tmp_path / "lora", tmp_path / "merged", rank=2
    )


def with_zeros(base: Path, patterns: Patterns, zero: Callable[[str, int], bool]) -> Delta:
    """A LoRA delta of rank 4, the components that `zero` names cleared."""
    method = Lora(rank=4)
    own, _ = numbers(method, base, patterns)
    for name, groups in own.items():
        cleared = [k for k in range(4) if zero(name, k)]
        q = groups["A"].q.copy()
        q[cleared] = 0
        own[name] = {**groups, "A": Quantised(q=q, scale=groups["A"].scale)}
    return build.build(base, build.Recipe(method=method, patterns=patterns), own)


@pytest.mark.parametrize("own_ranks", [False, True])
def test_zero_components_are_left_out_and_ranks_may_differ(own_ranks: bool, tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    patterns = Patterns(include=("*.query.weight", "*.key.weight"))
    made = with_zeros(base, patterns, lambda name, k: k == 0 or (".1." in name and k != 2))
    done = export_peft(base, made, tmp_path / "lora", PeftOptions(own_ranks=own_ranks))
    kilodelta.merge(base, made, tmp_path / "merged")
    assert done.rank == 3
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert set(config["rank_pattern"].values()) == ({1} if own_ranks else set())
    wrapped = opened("AutoModel", base, tmp_path / "lora")
    ranks = {
        path: layer.r["default"]
        for path, layer in wrapped.base_model.model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert {rank for path, rank in ranks.items() if ".1." in path} == {1 if own_ranks else 3}
    assert {rank for path, rank in ranks.items() if ".0." in path} == {3}
    assert_equals_merge("AutoModel", base, tmp_path / "lora", tmp_path / "merged", rank=3)


def test_an_update_of_zero_is_an_adapter_of_zeros(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    made = with_zeros(base, Patterns(include=("*.query.weight",)), lambda name, k: True)
    done = export_peft(base, made, tmp_path / "lora")
    assert (done.rank, done.error) == (1, 0)
    merged = opened("AutoModel", base, tmp_path / "lora").merge_and_unload().state_dict()
    before = transformers.AutoModel.from_pretrained(base).state_dict()
    assert all(torch.equal(merged[name], before[name]) for name in before)


@pytest.mark.parametrize(("dtype", "unit"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_narrow_factors_lose_what_the_result_says(dtype: str, unit: float, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = pico.bert(tmp_path / "base")
    made = delta(base, Nola(rank=3, bases=130), patterns=Patterns(include=("*.query.weight",)))
    done = export_peft(base, made, tmp_path / "lora", PeftOptions(dtype=dtype))
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}
    missed = whole = 0.0
    for name in made.targets:
        start = "base_model.model." + name.removesuffix(".weight")
        B, A = (tensors[f"{start}.lora_{x}.weight"].double().numpy() for x in "BA")
        missed += float(np.square(B @ A - made.update(name)).sum())
        whole += float(np.square(made.update(name)).sum())
    assert done.error == pytest.approx((missed / whole) ** 0.5, rel=1e-6)
    assert unit / 8 < done.error < 4 * unit


def test_factors_are_balanced_so_that_float16_does_not_underflow(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"w.weight": ("F32", (6, 5), bytes(120))})
    tiny = 3e-9 * np.arange(1, 7)[:, None]
    groups = build.quantise_target(Lora(rank=1), {"A": np.full((1, 5), 1e3), "B": tiny}, bits=8)
    recipe = build.Recipe(method=Lora(rank=1), patterns=Patterns(include=("w.weight",)))
    made = build.build(base, recipe, {"w.weight": groups})
    B, A = float_factors(made, "w.weight")
    assert np.allclose(B @ A, made.update("w.weight"), rtol=1e-15)
    assert 0.5 <= np.abs(B).max() / np.abs(A).max() <= 2
    assert export_peft(base, made, tmp_path / "lora", PeftOptions(dtype="float16")).error < 1e-3


def test_heads_norms_and_biases_travel(tmp_path: Path) -> None:
    base = pico.bert_classifier(tmp_path / "base")
    state = transformers.AutoModelForSequenceClassification.from_pretrained(base).state_dict()
    names = (
        "classifier.weight",
        "classifier.bias",
        "bert.encoder.layer.0.output.LayerNorm.bias",
        "bert.encoder.layer.1.attention.self.query.bias",
    )
    extras = {name: RawTensor.copy_of(state[name] + 0.25) for name in names}
    made = delta(base, Lora(rank=2), patterns=Patterns(include=("*.query.weight",)), extras=extras)
    done = export_peft(base, made, tmp_path / "lora")
    kilodelta.merge(base, made, tmp_path / "merged")
    assert done.modules_to_save == ("bert.encoder.layer.0.output.LayerNorm", "classifier")
    assert done.biases == (names[3],)
    kind = "AutoModelForSequenceClassification"
    assert_equals_merge(kind, base, tmp_path / "lora", tmp_path / "merged", rank=2)


def test_a_new_head_and_a_prefix(tmp_path: Path) -> None:
    """The base is the bare encoder; the adapted model calls it `bert` and has a head."""
    base = pico.bert(tmp_path / "base")
    generator = torch.Generator().manual_seed(5)
    head = {
        "classifier.weight": RawTensor.copy_of(torch.randn(3, pico.WIDTH, generator=generator)),
        "classifier.bias": RawTensor.copy_of(torch.randn(3, generator=generator)),
    }
    made = delta(
        base, Nola(rank=3, bases=20), patterns=Patterns(include=("*.value.weight",)), extras=head
    )
    export_peft(base, made, tmp_path / "lora", PeftOptions(prefix="bert"))
    config = transformers.AutoConfig.from_pretrained(base, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    model.bert.load_state_dict(transformers.AutoModel.from_pretrained(base).state_dict())
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    kilodelta.merge(base, made, tmp_path / "merged")
    encoder = transformers.AutoModel.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.arange(4, 12)[None]
    pooled = encoder(tokens).pooler_output
    weight, bias = (
        torch.from_numpy(head[f"classifier.{part}"].data.view(np.float32).copy()).reshape(shape)
        for part, shape in (("weight", (3, pico.WIDTH)), ("bias", (3,)))
    )
    expected = pooled @ weight.T + bias
    assert torch.allclose(wrapped(tokens).logits, expected, atol=1e-5)


def test_targets_and_settings_are_those_that_vllm_takes(tmp_path: Path) -> None:
    """vLLM reads r and lora_alpha, no patterns, and refuses biases, saved modules and DoRA; it
    knows tensors by `base_model.model.<path>.lora_A.weight`, (r, in), and the same for B."""
    from safetensors import safe_open

    base = pico.llama(tmp_path / "base")
    made = delta(base, Vera(rank=6), patterns=Patterns(include=("*_proj.weight",)))
    export_peft(base, made, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert config["use_dora"] == config["use_rslora"] == False  # noqa: E712
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "np") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for name, target in made.targets.items():
        start = "base_model.model." + name.removesuffix(".weight")
        assert shapes.pop(f"{start}.lora_A.weight") == (6, target.matrix[1])
        assert shapes.pop(f"{start}.lora_B.weight") == (target.matrix[0], 6)
    assert not shapes


def test_olive_reads_the_update_from_ranks_that_differ(tmp_path: Path) -> None:
    """Olive's `convert-adapters` turns every factor round, multiplies B by lora_alpha / r of the
    whole adapter, and passes over patterns: `x A B` has to be the update all the same."""
    from safetensors.numpy import load_file

    base = pico.llama(tmp_path / "base")
    layers = Patterns(include=("*_proj.weight",))
    made = with_zeros(base, layers, lambda name, k: ".1." in name and k != 2)
    export_peft(base, made, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    bound = made.bind(Checkpoint.open(base))
    for name in bound.targets:
        start = "base_model.model." + name.removesuffix(".weight")
        A, B = (tensors[f"{start}.lora_{side}.weight"].T.astype(float) for side in "AB")
        update = bound.update(name)
        product = A @ B * config["lora_alpha"] / config["r"]
        # Each factor is rounded once, to float32's 24 bits.
        assert np.linalg.norm(product - update.T) <= 2**-22 * np.linalg.norm(update)


def test_a_path_that_ends_another_is_targeted_alone(tmp_path: Path) -> None:
    weights = np.ones((6, 6), "<f4").tobytes()
    names = ("a.b.weight", "x.a.b.weight")
    base = write(tmp_path / "base.safetensors", {name: ("F32", (6, 6), weights) for name in names})
    made = delta(base, Lora(rank=1), patterns=Patterns(include=("a.b.weight",)))
    export_peft(base, made, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_modules"] == r"a\.b"


def test_full_rank_takes_an_svd_with_its_error(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    made = delta(
        base, RandLora(rank=5), patterns=Patterns(include=("*.query.weight", "*.dense.weight"))
    )
    with pytest.raises(ExportError, match="full rank") as caught:
        export_peft(base, made, tmp_path / "lora")
    assert "--svd" in caught.value.fix
    done = export_peft(base, made, tmp_path / "lora", PeftOptions(svd=4))
    lost = whole = worst = 0.0
    for name in made.targets:
        squares = np.square(np.linalg.svd(made.update(name), compute_uv=False))
        lost, whole = lost + squares[4:].sum(), whole + squares.sum()
        worst = max(worst, float((squares[4:].sum() / squares.sum()) ** 0.5))
    assert done.error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert done.worst_error == pytest.approx(worst, rel=1e-5)
    assert done.rank == 4
    assert opened("AutoModel", base, tmp_path / "lora")


def test_an_svd_of_all_ranks_loses_nothing(tmp_path: Path) -> None:
    base = pico.vit(tmp_path / "base")
    made = delta(base, RandLora(rank=5), patterns=ALL)
    done = export_peft(base, made, tmp_path / "lora", PeftOptions(svd=4096, as_loaded=True))
    assert done.error < 1e-6
    kilodelta.merge(base, made, tmp_path / "merged")
    kind = "AutoModelForImageClassification"
    # The factors are no exact ones here: eight more roundings' worth for the decomposition.
    assert_equals_merge(kind, base, tmp_path / "lora", tmp_path / "merged", rank=done.rank + 8)


def test_a_rank_that_is_not_low_is_refused(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    made = delta(base, Vera(rank=16), patterns=Patterns(include=("*.query.weight",)))
    with pytest.raises(ExportError, match=r"1024 entries, the weights have 512"):
        export_peft(base, made, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_tied_embedding_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = pico.gpt2(tmp_path / "base")
    wte = "transformer.wte.weight"
    made = delta(base, Lora(rank=1), patterns=Patterns(include=("*.wte.weight",)))
    for as_loaded in (False, True):
        with pytest.raises(ExportError, match=f"{wte} cannot travel .* tied"):
            export_peft(base, made, tmp_path / "lora", PeftOptions(as_loaded=as_loaded))
    whole = {wte: RawTensor.copy_of(np.zeros((pico.VOCABULARY, pico.WIDTH), np.float32))}
    made = delta(base, Lora(rank=1), patterns=Patterns(include=("*.c_fc.weight",)), extras=whole)
    with pytest.raises(ExportError, match=f"{wte} cannot travel .* tied"):
        export_peft(base, made, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_positions_and_untied_embeddings_travel(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base", tied=False)
    patterns = Patterns(include=("model.embed_tokens.weight", "lm_head.weight"))
    made = delta(base, Lora(rank=2), patterns=patterns)
    export_peft(base, made, tmp_path / "lora")
    export_peft(base, made, tmp_path / "loaded", PeftOptions(as_loaded=True))
    file = "adapter_model.safetensors"
    assert (tmp_path / "lora" / file).read_bytes() == (tmp_path / "loaded" / file).read_bytes()
    kilodelta.merge(base, made, tmp_path / "merged")
    kind = "AutoModelForCausalLM"
    assert_equals_merge(kind, base, tmp_path / "lora", tmp_path / "merged", rank=2)


@pytest.mark.parametrize(
    ("name", "shape", "why"),
    [
        ("token", (4, 4), "not the `weight` of a module"),
        ("experts.gate_up_proj", (2, 4, 4), "not the `weight` of a module"),
        ("deep.weight", (2, 2, 2, 2, 2, 2), "6 dimensions"),
        ("h.up.weight", (4, 4, 2, 2), "transposed convolution"),
    ],
)
def test_a_target_that_is_no_layer_of_peft_is_named(
    name: str, shape: tuple[int, ...], why: str, tmp_path: Path
) -> None:
    tensors = {name: ("F32", shape, np.ones(shape, "<f4").tobytes())}
    base = write(tmp_path / "base.safetensors", tensors)
    made = delta(base, Lora(rank=1), patterns=Patterns(include=("*",), transposed=("h.*",)))
    with pytest.raises(ExportError, match=f"{name} cannot travel in a PEFT adapter: .*{why}"):
        export_peft(base, made, tmp_path / "lora")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("temperature", "belongs to no module"),
        ("encoder.scale", r"holds other modules too \(encoder.layer\)"),
        ("classifier.weight", "would replace pre_classifier too"),
        ("encoder.layer.gain", "its own bias only"),
        ("encoder.layer.bias", "its own bias only"),
    ],
)
def test_an_extra_without_a_place_is_named(name: str, why: str, tmp_path: Path) -> None:
    ones = np.ones((4, 4), "<f4").tobytes()
    names = ("encoder.layer.weight", "pre_classifier.weight", "classifier.weight")
    base = write(tmp_path / "base.safetensors", {n: ("F32", (4, 4), ones) for n in names})
    extras = {name: RawTensor.copy_of(np.zeros((4, 4), np.float32))}
    made = delta(base, Lora(rank=1), patterns=Patterns(include=("encoder.*",)), extras=extras)
    with pytest.raises(ExportError, match=f"{name} cannot travel .*{why}"):
        export_peft(base, made, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_what_makes_no_sense_is_refused_and_nothing_written(tmp_path: Path) -> None:
    base, other = pico.bert(tmp_path / "base"), pico.bert(tmp_path / "other", seed=9)
    made = delta(base, Lora(rank=1), patterns=Patterns(include=("*.query.weight",)))
    for options, text in (
        (PeftOptions(dtype="int8"), "not written in 'int8'"),
        (PeftOptions(svd=0), "rank 0 makes no sense"),
        (PeftOptions(prefix="bert."), "ends in a dot"),
        (PeftOptions(prefix="bert", as_loaded=True), "not from both"),
    ):
        with pytest.raises(InputError, match=text):
            export_peft(base, made, tmp_path / "lora", options)
    with pytest.raises(BaseMismatchError, match="changed: "):
        export_peft(other, made, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    with pytest.raises(OutputError, match="exists already"):
        export_peft(base, made, other)


def test_embeddings_can_be_named(tmp_path: Path) -> None:
    """A table by another name is taken for a Linear unless told."""
    ones = np.ones((6, 4), "<f4").tobytes()
    base = write(tmp_path / "base.safetensors", {"table.weight": ("F32", (6, 4), ones)})
    made = delta(base, Lora(rank=2), patterns=Patterns(include=("table.weight",)))
    export_peft(base, made, tmp_path / "lora", PeftOptions(embeddings=("table.*",)))

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(6, 4)

    wrapped = peft.PeftModel.from_pretrained(Model(), tmp_path / "lora")
    update = wrapped.base_model.model.table.get_delta_weight("default").numpy()
    assert np.allclose(update, made.update("table.weight"), rtol=1e-6)


def test_a_device_without_torch_and_peft_writes_adapters(tmp_path: Path) -> None:
    blocked = BLOCKED.replace("{'torch'", "{'peft', 'torch'")
    assert blocked != BLOCKED
    out = run(
        f"{blocked}\nfrom kilodelta.export.peft.adapter import PeftOptions, export_peft\n"
        f"base = {str(GOLDEN / 'base.safetensors')!r}\n"
        f"file = {str(GOLDEN / 'randlora-8.kd')!r}\n"
        f"print(export_peft(base, file, {str(tmp_path / 'lora')!r}, PeftOptions(svd=2)).rank)\n"
    )
    assert out.split() == ["2"]


def test_progress_counts_every_target(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    made = delta(base, Lora(rank=1), patterns=Patterns(include=("*.query.weight",)))
    events: list[Any] = []
    export_peft(base, replace(made, layout=None), tmp_path / "lora", progress=events.append)
    last = [event for event in events if event.stage == "factors"][-1]
    assert (last.done, last.total) == (2, 2)


def test_the_command_writes_an_adapter_and_says_what_it_lost(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from kilodelta.cli import main

    def invoke(*options: str) -> Any:
        given = ["export-peft", str(base), str(tmp_path / "task.kd"), "-o", str(tmp_path / "lora")]
        return CliRunner().invoke(main, [*given, *options])

    base = pico.bert(tmp_path / "base")
    delta(base, RandLora(rank=5), patterns=Patterns(include=("*.query.weight",))).save(
        tmp_path / "task.kd"
    )
    refused = invoke()
    assert (refused.exit_code, "--svd RANK" in refused.output) == (11, True)
    assert not (tmp_path / "lora").exists()
    done = invoke("--svd", "3", "--dtype", "bf16", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["rank"], told["dtype"], told["targets"]) == (3, "bfloat16", 2)
    assert 0 < told["error"] < 1
    assert opened("AutoModel", base, tmp_path / "lora")


@pytest.mark.parametrize("flag", ["peft", "adapter", "gguf"])
def test_the_old_spelling_names_the_new_command(flag: str) -> None:
    """Whatever options of the new command stand beside it."""
    from click.testing import CliRunner

    from kilodelta.cli import main

    given = ["export", "base", "a.kd", "-o", "out", "--svd", "3", "--rank", "4", f"--{flag}"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 9, done.output
    assert f"export --{flag} is a command" in done.output
    assert f"kilodelta export-{flag} BASE FILE -o OUT" in done.output
