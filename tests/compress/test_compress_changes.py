"""What differs between two models, and how it travels: types, ties, heads, names, configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import kilodelta
from kilodelta.compress import Options, compress
from kilodelta.compress.distill.changes.compare import compare, equal_tensors
from kilodelta.compress.distill.changes.configuration import difference
from kilodelta.compress.distill.changes.split import Wishes, split
from kilodelta.compress.distill.changes.structure import Structure
from kilodelta.compress.distill.learn import watch
from kilodelta.compress.distill.report import Report
from kilodelta.errors import BaseMismatchError, CheckpointError, InputError
from kilodelta.files import safetensors
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.tensor import RawTensor
from kilodelta.format.methods import Lora, Nola
from kilodelta.models.weights import tensor
from tests.support import pico

Tensors = dict[str, Tensor]


def saved(path: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    path.parent.mkdir(exist_ok=True)
    safetensors.write(path, {name: RawTensor.of(value) for name, value in tensors.items()})
    return Checkpoint.open(path)


def loaded(folder: Path) -> Tensors:
    checkpoint = Checkpoint.open(folder)
    return {name: tensor(checkpoint, name) for name in checkpoint.names}


def rewritten(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """A folder's weights changed in place."""
    tensors = loaded(folder)
    found = change(tensors)
    saved(folder / "model.safetensors", tensors if found is None else found)
    return folder


def reconfigured(folder: Path, **keys: Any) -> Path:
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, **keys}))
    return folder


def trained(tensors: Tensors, glob: str = "", size: float = 0.2) -> None:
    """A change of rank 2 in every matrix whose name holds a text."""
    generator = torch.Generator().manual_seed(5)
    for name, values in tensors.items():
        if values.dim() == 2 and glob in name:
            left = torch.randn(values.shape[0], 2, generator=generator)
            right = torch.randn(2, values.shape[1], generator=generator)
            tensors[name] = (values.float() + size * left @ right).to(values.dtype)


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1).min())


IDS = torch.tensor([[2, 5, 9, 11, 30, 3]])


def logits(folder: Path, kind: str = "AutoModelForCausalLM") -> Tensor:
    """What transformers computes with a folder, opened as a user opens it."""
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


# ---- values across types


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_tuned_tensor_that_holds_no_numbers_is_refused(value: float, tmp_path: Path) -> None:
    """A truncated SVD runs nothing, so no output would show it."""
    numbers = {"a": torch.ones(4), "n": torch.tensor([1.0, -torch.inf])}
    wrong = torch.tensor([1.0, 2.0, value, 3.0])
    base = saved(tmp_path / "b", numbers)
    tuned = saved(tmp_path / "t", {**numbers, "a": wrong})
    with pytest.raises(CheckpointError, match="t: a holds NaN or infinity"):
        compare(base, tuned)
    moved = {"a": torch.zeros(4), "n": torch.tensor([2.0, -torch.inf])}
    assert len(compare(base, saved(tmp_path / "m", moved))) == 2  # a mask's infinity may stay
    broken = saved(tmp_path / "x", {**numbers, "w": wrong.view(2, 2)})
    with pytest.raises(CheckpointError, match=r"x: w holds NaN or infinity where .*y has a number"):
        compare(broken, saved(tmp_path / "y", {**numbers, "w": torch.ones(2, 2)}))
    new = saved(tmp_path / "h", {**numbers, "head": wrong})
    if value != value:
        with pytest.raises(CheckpointError, match="h: head holds NaN"):
            compare(base, new)
    else:
        assert [change.name for change in compare(base, new)] == ["head"]


@pytest.mark.parametrize(("narrow", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_another_float_type_alone_is_no_change(
    narrow: torch.dtype, name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    wide = {"a.weight": torch.randn(6, 4), "b.weight": torch.randn(5, 4), "n": torch.randn(4)}
    near = {key: value.to(narrow) for key, value in wide.items()}
    tuned = {**wide, "a.weight": wide["a.weight"] + 0.5}
    [down] = compare(saved(tmp_path / "n", near), saved(tmp_path / "t", tuned))
    assert (down.name, down.dtype, down.is_matrix) == ("a.weight", name, True)
    before = near["a.weight"].double()
    assert down.norm == pytest.approx(float((tuned["a.weight"].double() - before).norm()))
    [up] = compare(
        saved(tmp_path / "w", wide),
        saved(tmp_path / "u", {key: value.to(narrow) for key, value in tuned.items()}),
    )
    assert (up.name, up.dtype, up.is_matrix) == ("a.weight", "F32", True)
    with pytest.raises(BaseMismatchError, match="holds the values of"):
        compare(saved(tmp_path / "x", near), saved(tmp_path / "y", wide))


def test_a_tensor_is_compared_in_parts_as_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kilodelta.compress.distill.changes.compare.BLOCK", 4)
    fine = torch.tensor([1.0, 1.0009765625, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])  # float16 has it
    wide = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 2.0**100, 1.0, 1.0, 1.0])  # bfloat16 has it
    tensors = {"fine": fine.half(), "both": (fine + 0).half(), "number": fine.half()}
    others = {
        "fine": fine.bfloat16(),  # equal by rounding: no change
        "both": wide.bfloat16(),  # the first part by one rounding, the second by none
        "number": fine.half() + torch.tensor([0.0] * 8 + [3.0]).half(),
    }
    save_file(tensors, tmp_path / "base.safetensors")
    save_file(others, tmp_path / "tuned.safetensors")
    base, tuned = (Checkpoint.open(tmp_path / f"{n}.safetensors") for n in ("base", "tuned"))
    changes = {change.name: change for change in compare(base, tuned)}
    assert sorted(changes) == ["both", "number"]
    assert changes["number"].norm == 3.0
    size = float(torch.linalg.vector_norm(fine.half().double()))
    assert changes["number"].relative == pytest.approx(3 / size, rel=1e-14)


def test_what_is_equal_and_what_is_new(tmp_path: Path) -> None:
    nan = torch.tensor([1.0, torch.nan])
    base = {
        "same": torch.ones(2), "zero": torch.zeros(3), "nan": nan, "steps": torch.tensor(3),
        "wide": torch.tensor([1, 2]), "grown": torch.ones(2, 2), "kind": torch.tensor([1, 2]),
    }  # fmt: skip
    tuned = {
        "same": torch.ones(2).half(), "zero": -torch.zeros(3), "nan": nan.double(),
        "steps": torch.tensor(9), "wide": torch.tensor([1, 2], dtype=torch.int32),
        "grown": torch.ones(3, 2), "kind": torch.tensor([1.0, 2.0]), "head": torch.ones(1, 2),
    }  # fmt: skip
    found = compare(saved(tmp_path / "a", base), saved(tmp_path / "b", tuned))
    assert {c.name: c.is_new for c in found} == {
        "grown": True, "head": True, "kind": True, "steps": False
    }  # fmt: skip
    assert next(c.norm for c in found if c.name == "steps") == 0


def test_a_base_in_bfloat16_takes_a_fine_tune_in_float32(tmp_path: Path) -> None:
    wide = pico.llama(tmp_path / "wide")
    base, tuned = copied(wide, tmp_path / "base"), copied(wide, tmp_path / "tuned")
    rewritten(base, lambda t: {n: v.bfloat16() for n, v in t.items()})
    rewritten(tuned, lambda t: {n: v.bfloat16().float() for n, v in t.items()})
    rewritten(tuned, lambda t: trained(t, "self_attn"))
    report = compress(base, tuned, tmp_path / "a.kd", options=Options(method=Lora(rank=2), bits=16))
    assert not report.extras
    assert not report.dropped
    assert report.weight_error < 0.01
    assert report.nbytes["file"] < 6000
    kilodelta.merge(base, tmp_path / "a.kd", tmp_path / "merged")
    merged, wanted = loaded(tmp_path / "merged"), loaded(tuned)
    assert {v.dtype for v in merged.values()} == {torch.bfloat16}
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.allclose(merged[name].float(), wanted[name], atol=0.02)


def test_the_agreement_is_measured_on_the_rounded_weights(tmp_path: Path) -> None:
    """In bfloat16 the merge rounds; the student, in float32, does not."""
    base = pico.bert_classifier(tmp_path / "base")
    rewritten(
        base, lambda t: {n: v.bfloat16() if v.is_floating_point() else v for n, v in t.items()}
    )
    tuned = copied(base, tmp_path / "tuned")
    rewritten(tuned, lambda t: trained(t, "", size=0.3))
    ids = np.random.default_rng(0).integers(4, 40, (60, 6))
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    options = Options(method=Lora(rank=1), steps=8, batch=16, held_out=40, dtype="fp32")
    report = compress(base, tuned, tmp_path / "a.kd", inputs=tmp_path / "ids.npz", options=options)
    kilodelta.merge(base, tmp_path / "a.kd", tmp_path / "merged")
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()[:40]
    global IDS
    kept, IDS = IDS, torch.from_numpy(ids[order])
    try:
        kind = "AutoModelForSequenceClassification"
        ours, theirs = logits(tmp_path / "merged", kind), logits(tuned, kind)
    finally:
        IDS = kept
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    assert report.after is not None
    assert report.after.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert report.after.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), 1e-3)


# ---- tied tensors


def test_a_tied_head_repeated_in_the_tuned_file_is_no_extra(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    tuned = rewritten(copied(base, tmp_path / "tuned"), lambda t: trained(t, "self_attn"))
    rewritten(tuned, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    report = compress(base, tuned, tmp_path / "a.kd", options=Options(method=Lora(rank=2)))
    assert not report.extras
    assert not report.dropped
    assert not report.config


def test_a_head_that_was_untied_travels_and_says_so(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    tuned = rewritten(copied(base, tmp_path / "tuned"), lambda t: trained(t, "self_attn", 0.05))
    head = 0.3 * torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
    rewritten(tuned, lambda t: {**t, "lm_head.weight": head})
    np.savez(tmp_path / "ids.npz", input_ids=np.random.default_rng(0).integers(4, 40, (40, 6)))
    report = compress(
        base,
        tuned,
        tmp_path / "a.kd",
        inputs=tmp_path / "ids.npz",
        options=Options(method=Lora(rank=4), bits=16, steps=8, batch=8),
    )
    assert report.extras == ("lm_head.weight",)
    assert report.config["tie_word_embeddings"] is False
    kilodelta.merge(base, tmp_path / "a.kd", tmp_path / "merged")
    assert torch.equal(
        loaded(tmp_path / "merged")["model.embed_tokens.weight"],
        loaded(base)["model.embed_tokens.weight"],
    )
    assert cosine(logits(tmp_path / "merged"), logits(tuned)) > 0.98


@pytest.mark.parametrize("learns", [False, True])
def test_a_base_that_repeats_the_tied_head_takes_the_update_in_both(
    learns: bool, tmp_path: Path
) -> None:
    """Once the merged folder kept the old head, loaded untied, and everything was proved."""
    base = pico.llama(tmp_path / "base")
    tuned = rewritten(copied(base, tmp_path / "tuned"), lambda t: trained(t, "", 0.3))
    rewritten(base, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    np.savez(tmp_path / "ids.npz", input_ids=np.random.default_rng(0).integers(4, 40, (40, 6)))
    report = compress(
        base,
        tuned,
        tmp_path / "a.kd",
        inputs=tmp_path / "ids.npz" if learns else None,
        options=Options(method=Lora(rank=4), bits=16, targets=("*",), steps=4, batch=8),
    )
    delta = kilodelta.load(tmp_path / "a.kd", base=base)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(delta.targets)
    assert report.config["tie_word_embeddings"] is False
    kilodelta.merge(base, tmp_path / "a.kd", tmp_path / "merged")
    merged, wanted = loaded(tmp_path / "merged"), loaded(tuned)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.allclose(merged[name], wanted["model.embed_tokens.weight"], atol=0.05), name
    assert cosine(logits(tmp_path / "merged"), logits(tuned)) > 0.99


def test_tied_tensors_change_together_or_not_at_all(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    tuned = rewritten(copied(base, tmp_path / "tuned"), lambda t: trained(t, "", 0.3))
    rewritten(base, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    options = Options(method=Lora(rank=1), targets=("model.*",), exclude=("lm_head*",))
    with pytest.raises(InputError, match=r"model.embed_tokens.weight and lm_head.weight are one"):
        compress(base, tuned, tmp_path / "a.kd", options=options)
    options = Options(method=Lora(rank=1), targets=("*embed*",))
    report = compress(base, tuned, tmp_path / "a.kd", options=options)
    assert report.targets == 2
    default = compress(base, tuned, tmp_path / "b.kd", options=Options(method=Lora(rank=1)))
    assert "lm_head.weight" not in {change.name for change in default.dropped}


def test_equal_matrices_are_found_by_their_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    word = torch.randn(70, 8)
    near = word.clone()
    near[35, 3] += 1  # differs in the middle only
    tensors = {"a": word, "b": word.clone(), "c": near, "d": torch.zeros(70, 8), "e": word.half()}
    tensors["f"] = torch.zeros(70, 8)
    checkpoint = saved(tmp_path / "a", tensors)
    assert equal_tensors(checkpoint, checkpoint.names) == {"a": ("a", "b"), "b": ("a", "b")}


def test_a_masked_language_model_with_a_tied_decoder(tmp_path: Path) -> None:
    """The short glob of the head's own layer once matched the decoder, which no file holds."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(**pico._bert_options())
    base = pico.save(lambda: BertForMaskedLM(config), tmp_path / "base", 0, tokens=True)
    assert "cls.predictions.decoder.weight" not in Checkpoint.open(base)
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.1)
    np.savez(tmp_path / "ids.npz", input_ids=np.random.default_rng(0).integers(4, 40, (40, 6)))
    options = Options(method=Nola(rank=2, bases=20), steps=4, batch=8)
    report = compress(base, tuned, tmp_path / "a.kd", inputs=tmp_path / "ids.npz", options=options)
    targets = kilodelta.load(tmp_path / "a.kd", base=base).targets
    assert "cls.predictions.transform.dense.weight" in targets
    assert "cls.predictions.decoder.weight" not in targets
    assert report.targets == len(targets) == 13


# ---- names and places


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    base = rewritten(
        pico.llama(tmp_path / "base"),
        lambda t: {**t, "model.mtp.0.proj.weight": torch.randn(16, 16)},
    )
    tuned = rewritten(copied(base, tmp_path / "tuned"), lambda t: trained(t))
    np.savez(tmp_path / "ids.npz", input_ids=np.zeros((40, 6), int))
    options = Options(method=Lora(rank=1), targets=("*",))
    with pytest.raises(InputError, match=r"model.mtp.0.proj.weight has no place in the module"):
        compress(base, tuned, tmp_path / "a.kd", inputs=tmp_path / "ids.npz", options=options)
    fitted = compress(base, tuned, tmp_path / "a.kd", options=Options(method=Lora(rank=2), bits=16,
                      targets=("*",)))  # fmt: skip
    assert "model.mtp.0.proj.weight" in kilodelta.load(tmp_path / "a.kd", base=base).targets
    assert fitted.weight_error < 0.01


@pytest.mark.parametrize("bare", [False, True])
def test_an_architecture_that_cannot_be_opened_is_fitted_by_names(
    bare: bool, tmp_path: Path
) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    base = pico.save(lambda: T5ForConditionalGeneration(config), tmp_path / "base", 0)
    tuned = rewritten(copied(base, tmp_path / "tuned"), lambda t: trained(t, "SelfAttention.q"))
    places = (base / "model.safetensors", tuned / "model.safetensors") if bare else (base, tuned)
    report = compress(*places, tmp_path / "a.kd", options=Options(method=Lora(rank=2), bits=16))
    assert report.targets == 4
    assert report.weight_error < 0.01
    # a folder's encoder-decoder opens; a bare file has no architecture
    assert any("no module was built" in text for text in report.warnings) is bare
    out = tmp_path / ("merged.safetensors" if bare else "merged")
    kilodelta.merge(places[0], tmp_path / "a.kd", out)
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.allclose(loaded(out)[name], loaded(tuned)[name], atol=1e-3)
    np.savez(tmp_path / "ids.npz", input_ids=np.zeros((40, 6), int))
    with pytest.raises(InputError):
        compress(*places, tmp_path / "b.kd", inputs=tmp_path / "ids.npz")


def test_names_alone_find_a_prefix_and_a_repeated_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    word, body = torch.randn(9, 4), torch.randn(4, 4)
    base = {"embed.weight": word, "layer.0.weight": body, "head.weight": word.clone()}
    moved = word + 1
    tuned = {"enc.embed.weight": moved, "enc.layer.0.weight": body + 1, "score.weight": body[:2]}
    saved(tmp_path / "base.safetensors", base)
    saved(tmp_path / "tuned.safetensors", tuned)
    report = compress(
        tmp_path / "base.safetensors",
        tmp_path / "tuned.safetensors",
        tmp_path / "a.kd",
        options=Options(method=Lora(rank=4), bits=16, targets=("*",)),
    )
    assert report.extras == ("score.weight",)
    kilodelta.merge(tmp_path / "base.safetensors", tmp_path / "a.kd", tmp_path / "m.safetensors")
    merged = loaded(tmp_path / "m.safetensors")
    for name in ("embed.weight", "head.weight"):
        assert torch.allclose(merged[name], moved, atol=1e-3), name


def test_a_tuned_model_that_lacks_what_the_base_has_is_refused(tmp_path: Path) -> None:
    base = pico.bert_classifier(tmp_path / "base")
    tuned = rewritten(copied(base, tmp_path / "tuned"), lambda t: trained(t))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    rewritten(tuned, lambda t: {n: v for n, v in t.items() if n != name})
    np.savez(tmp_path / "ids.npz", input_ids=np.zeros((40, 6), int))
    with pytest.raises(CheckpointError, match=f"lacks {name}, which the base has"):
        compress(base, tuned, tmp_path / "a.kd", inputs=tmp_path / "ids.npz")


CHANGES: Mapping[str, tuple[int, ...]] = {"layer.a.weight": (4, 4), "norm.weight": (4,)}


def sorted_by(wishes: Wishes, tmp_path: Path, **more: Tensor) -> dict[str, list[str]]:
    base = {name: torch.ones(shape) for name, shape in CHANGES.items()}
    tuned = {name: torch.ones(shape) * 2 for name, shape in CHANGES.items()} | more
    changes = compare(saved(tmp_path / "b", base), saved(tmp_path / "t", tuned))
    structure = Structure(layers=frozenset({"layer.a.weight"}))
    found = split(changes, wishes, structure, names=list(tuned), ties={})
    return {
        part: [change.name for change in getattr(found, part)]
        for part in ("targets", "extras", "dropped")
    }


def test_none_stores_nothing_and_exclude_leaves_alone(tmp_path: Path) -> None:
    head = torch.ones(2, 4)
    assert sorted_by(Wishes(), tmp_path, head=head) == {
        "targets": ["layer.a.weight"], "extras": ["head"], "dropped": ["norm.weight"]
    }  # fmt: skip
    assert sorted_by(Wishes(extras="none"), tmp_path, head=head)["extras"] == []
    assert sorted_by(Wishes(exclude=("head",)), tmp_path, head=head)["extras"] == []
    left = sorted_by(Wishes(exclude=("head", "norm*"), extras="all"), tmp_path, head=head)
    assert left["dropped"] == ["head", "norm.weight"]
    assert sorted_by(Wishes(extras="norm*,head"), tmp_path, head=head)["dropped"] == []
    assert sorted_by(Wishes(extras="*"), tmp_path, head=head)["extras"] == ["head", "norm.weight"]


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        (Wishes(targets=("layer.b*",)), r"--targets 'layer.b\*' matches no tensor"),
        (Wishes(exclude=("nom.weight",)), "--exclude 'nom.weight' matches no tensor"),
        (Wishes(extras="norm*,haed"), "--extras 'haed' matches no tensor"),
        (Wishes(extras="norm*,layer*"), r"--extras 'layer\*' names what coefficients change"),
        (Wishes(targets=("norm*",)), "leave no changed matrix to compress; 1 changed, such as"),
        (Wishes(exclude=("*",)), "leave no changed matrix to compress"),
    ],
)
def test_a_pattern_that_does_nothing_is_refused(
    wishes: Wishes, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        sorted_by(wishes, tmp_path)


def test_a_new_head_that_is_not_to_be_stored_cannot_be_learnt_with(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    tuned = pico.bert_classifier(tmp_path / "tuned")
    np.savez(tmp_path / "ids.npz", input_ids=np.zeros((40, 6), int))
    options = Options(method=Lora(rank=1), extras="none")
    with pytest.raises(InputError, match=r"classifier\.\w+ is new and is not to be stored"):
        compress(base, tuned, tmp_path / "a.kd", inputs=tmp_path / "ids.npz", options=options)
    report = compress(base, tuned, tmp_path / "a.kd", options=options)
    assert not report.extras
    assert any("new tensors are not stored: classifier.bias" in text for text in report.warnings)


# ---- configuration


def test_a_new_head_brings_its_configuration(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    tuned = pico.bert_classifier(tmp_path / "tuned", labels=5)
    labels = {str(i): f"label {i}" for i in range(5)}
    reconfigured(tuned, id2label=labels, label2id={v: int(k) for k, v in labels.items()},
                 problem_type="single_label_classification")  # fmt: skip
    report = compress(base, tuned, tmp_path / "a.kd", options=Options(method=Lora(rank=1)))
    wanted = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": labels,
        "problem_type": "single_label_classification",
    }
    assert report.config == wanted
    assert report.new == ("classifier.bias", "classifier.weight")
    assert kilodelta.load(tmp_path / "a.kd").manifest.config == wanted


def test_the_same_configuration_costs_nothing(tmp_path: Path) -> None:
    base = pico.bert_classifier(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned")
    table = json.loads((tuned / "config.json").read_text())
    del table["hidden_act"]  # the class's own default
    about_files = {"use_cache": False, "dtype": "float16", "transformers_version": "0", "_x": 1}
    (tuned / "config.json").write_text(json.dumps({**table, **about_files}))
    assert difference(Checkpoint.open(base), Checkpoint.open(tuned)) == ({}, ())


def test_labels_that_are_too_many_are_named(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    tuned = pico.bert_classifier(tmp_path / "tuned", labels=3)
    reconfigured(tuned, id2label={str(i): "x" * 60 for i in range(2000)}, custom={"a b": 1})
    found, dropped = difference(Checkpoint.open(base), Checkpoint.open(tuned))
    assert found == {"architectures": ["BertForSequenceClassification"]}
    assert set(dropped) >= {"id2label", "custom"}


def test_a_base_without_a_configuration_takes_the_head_s(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    tuned = pico.bert_classifier(tmp_path / "tuned", labels=3)
    found, _ = difference(Checkpoint.open(base / "model.safetensors"), Checkpoint.open(tuned))
    assert set(found) == {"architectures", "id2label"}


# ---- what a user should hear of


def warned(report: Report, text: str) -> bool:
    return any(text in warning for warning in report.warnings)


def test_exchanged_models_are_suspected(tmp_path: Path) -> None:
    base = pico.bert(tmp_path / "base")
    tuned = pico.bert_classifier(tmp_path / "tuned", labels=3)
    options = Options(method=Lora(rank=1), targets=("*query*",))
    wrong = compress(tuned, base, tmp_path / "a.kd", options=options)
    assert warned(wrong, "the base holds classifier.bias, classifier.weight, which the tuned model"
                         " lacks: are the two models given in the right order")  # fmt: skip
    right = compress(base, tuned, tmp_path / "b.kd", options=options)
    assert not warned(right, "right order")
    (base / "training_args.bin").write_bytes(b"x")
    assert warned(compress(base, tuned, tmp_path / "c.kd", options=options), "training_args.bin")


def test_a_result_that_is_worse_than_the_base_is_said_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no lower rate is left to begin again with."""
    monkeypatch.setattr(watch, "ATTEMPTS", 0)
    monkeypatch.setattr(watch, "ASTRAY", np.inf)
    base = pico.bert_classifier(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.01)
    np.savez(tmp_path / "ids.npz", input_ids=np.random.default_rng(0).integers(4, 40, (60, 6)))
    options = Options(method=Nola(rank=4, bases=64), rate=30.0, steps=8, batch=8)
    report = compress(base, tuned, tmp_path / "a.kd", inputs=tmp_path / "ids.npz", options=options)
    assert warned(report, "the file is worse than none: with it the base agrees with the tuned")
    made = kilodelta.inspect(tmp_path / "a.kd").made
    assert report.before is not None
    assert made["base_agreement"] == round(report.before.agreement, 4)


def test_repeated_inputs_are_not_learnt_from_and_measured_on(tmp_path: Path) -> None:
    base = pico.bert_classifier(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned")
    ids = np.random.default_rng(0).integers(4, 40, (20, 6))
    np.savez(tmp_path / "ids.npz", input_ids=np.concatenate([ids, ids, ids]))
    options = Options(method=Lora(rank=1), steps=2, batch=8, held_out=8)
    report = compress(base, tuned, tmp_path / "a.kd", inputs=tmp_path / "ids.npz", options=options)
    text = next(t for t in report.warnings if "equal one that is held out" in t)
    assert int(text.split()[0]) >= 8


def test_what_is_not_stored_counts_in_the_error(tmp_path: Path) -> None:
    base = pico.bert_classifier(tmp_path / "base")
    tuned = rewritten(copied(base, tmp_path / "tuned"), lambda t: trained(t))
    options = Options(method=Lora(rank=2), bits=16, targets=("*query.weight",))
    report = compress(base, tuned, tmp_path / "a.kd", options=options)
    assert min(layer.explained for layer in report.layers) > 0.999
    assert report.weight_error**2 == pytest.approx(report.dropped_energy, rel=1e-3)
    assert report.dropped_energy > 0.5
    assert warned(report, f"{report.dropped_energy:.0%} of the change is not stored: ")
