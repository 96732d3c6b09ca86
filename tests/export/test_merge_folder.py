"""What a merged folder holds beside its weights: which files, and whose configuration."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilodelta.errors import InputError
from kilodelta.export.merge.checkpoint import Merged, merge
from kilodelta.files import system
from kilodelta.files.checkpoint import INDEX, Checkpoint
from kilodelta.files.staging import sidecars
from kilodelta.files.staging.sidecars import HOLDS_WEIGHTS, LEADS_OUT, TOO_LARGE
from kilodelta.files.tensor import RawTensor
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Lora
from kilodelta.format.targets import Patterns
from tests.support import pico
from tests.support.making import delta, folder, model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return folder(tmp_path / "base", model())


def merged(base: Path, made: Delta | None = None, **options: Any) -> Merged:
    return merge(base, made or delta(base, Lora(rank=1)), base.parent / "out", **options)


def listing(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


PLAIN = {"config.json", "model.safetensors", "tokenizer", "tokenizer/vocab.txt"}

# files


@pytest.mark.parametrize(
    "name",
    [
        "original/consolidated.00.pth",
        "checkpoint-500/model.safetensors",
        "checkpoint-500/optimizer.pt",
        "gguf/model-q4.gguf",
        "exports/v1/model.onnx",
        "onnx/tokenizer.json",  # nothing in it is a weight, but it belongs to those that were
        "deep/er/pytorch_model-00001-of-00002.bin",
        "saved/variables/variables.h5",
        "Model.mlpackage/Manifest.json",
    ],
)
def test_folders_that_hold_the_bases_weights_stay_behind(base: Path, name: str) -> None:
    place = base / name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"old weights")
    (place.parent / "config.json").write_text("{}")
    done = merged(base)
    assert done.left_out == {f"{Path(name).parent}/": HOLDS_WEIGHTS}
    assert not (base.parent / "out" / name).exists()
    assert not (base.parent / "out" / Path(name).parent / "config.json").exists()


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model.onnx_data",
        "model.onnx.data",
        "MODEL.GGUF",
        "other.safetensors",
        "openvino_model.xml",
        "adapter_config.json",
        "training_args.bin",
    ],
)
def test_files_that_hold_the_bases_weights_stay_behind(base: Path, name: str) -> None:
    if name.endswith(".safetensors"):  # beside the model, which its name tells
        assert (base / "model.safetensors").is_file()
    (base / name).write_bytes(b"old weights")
    assert merged(base).left_out == {name: HOLDS_WEIGHTS}
    assert listing(base.parent / "out") == PLAIN


def test_further_modules_keep_their_weights(base: Path) -> None:
    """sentence-transformers: a Dense layer behind the encoder is no form of the encoder."""
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (base / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "3_Old/model.safetensors"):
        (base / name).parent.mkdir()
        (base / name).write_text(name)
    assert merged(base).left_out == {"3_Old/": HOLDS_WEIGHTS}
    assert (base.parent / "out" / "2_Dense" / "model.safetensors").read_text().startswith("2_")
    assert (base.parent / "out" / "1_Pooling" / "config.json").is_file()


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"path": 3}', "[" * 100_000])
def test_a_strange_modules_json_names_none(base: Path, text: str) -> None:
    (base / "modules.json").write_text(text)
    (base / "2_Dense").mkdir()
    (base / "2_Dense" / "model.safetensors").write_text("")
    assert merged(base).left_out == {"2_Dense/": HOLDS_WEIGHTS}


# links, pipes, devices


def test_nothing_outside_the_folder_gets_in(base: Path) -> None:
    """Links to files and folders, relative and absolute, at the top and below; pipes; loops."""
    outside = base.parent / "secret"
    outside.mkdir()
    (outside / "key").write_text("SECRET")
    (base / "sub").mkdir()
    links = {
        "absolute": outside / "key",
        "relative": Path("../secret/key"),
        "sub/down": Path("../../secret/key"),
        "folder": outside,
        "loop": Path("."),
        "sub/loop": base,
        "zero": Path("/dev/zero"),
        "gone": Path("nowhere"),
        "within": Path("config.json"),
    }
    for name, target in links.items():
        (base / name).symlink_to(target)
    os.mkfifo(base / "pipe")
    os.mkfifo(base / "sub" / "pipe")
    done = merged(base)
    names = {*links, "pipe", "sub/pipe"}
    assert done.left_out == dict.fromkeys(sorted(names), LEADS_OUT)
    assert listing(base.parent / "out") == PLAIN | {"sub"}


def test_a_pipe_called_modules_json_blocks_nothing(base: Path) -> None:
    os.mkfifo(base / "modules.json")
    assert merged(base).left_out == {"modules.json": LEADS_OUT}


def test_a_hugging_face_cache_is_links_into_its_blobs(base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    (tmp_path / "secret").write_text("SECRET")
    for number, path in enumerate(sorted(p for p in base.rglob("*") if p.is_file())):
        blob, link = cache / "blobs" / f"{number:040x}", snapshot / path.relative_to(base)
        shutil.copyfile(path, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (snapshot / "out").symlink_to("../../../secret")
    (snapshot / "through").symlink_to("../../blobs/../../secret")
    (cache / "blobs" / "on").symlink_to("../../secret")
    (snapshot / "twice").symlink_to("../../blobs/on")
    done = merge(snapshot, delta(base, Lora(rank=1)), tmp_path / "out")
    assert listing(tmp_path / "out") == PLAIN
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert done.left_out == dict.fromkeys(("out", "through", "twice"), LEADS_OUT)


def test_a_cache_of_another_kind_follows_no_links(base: Path, tmp_path: Path) -> None:
    """The layout is known by its names, not by links that happen to lead to `blobs`."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1").write_text("x")
    (base / "notes").symlink_to("../blobs/1")
    assert merged(base).left_out == {"notes": LEADS_OUT}


def test_a_file_that_is_too_large_is_left_out(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecars, "LIMIT", 1000)
    (base / "movie").write_bytes(bytes(1001))
    assert merged(base).left_out == {"movie": TOO_LARGE}
    assert listing(base.parent / "out") == PLAIN


def test_hidden_entries_are_passed_over(base: Path) -> None:
    for name in (".git", "tokenizer/.cache"):
        (base / name).mkdir()
        (base / name / "x").write_text("x")
    assert merged(base).left_out == {}
    assert listing(base.parent / "out") == PLAIN


def test_a_result_inside_the_base_does_not_copy_itself(base: Path) -> None:
    (base / "sub").mkdir()
    merge(base, delta(base, Lora(rank=1)), base / "sub" / "out")
    assert listing(base / "sub" / "out") == PLAIN | {"sub"}


# the index


def total_size(place: Path) -> tuple[int, int]:
    """What the index says, and what its shards hold."""
    checkpoint = Checkpoint.open(place)
    stated = json.loads((place / INDEX).read_bytes())["metadata"]["total_size"]
    return stated, sum(checkpoint.info(name).nbytes for name in checkpoint.names)


@pytest.mark.parametrize(
    "extras",
    [
        {"head.weight": np.ones((3, 9), np.float32)},  # added
        {"norm.bias": np.ones(20, np.float32)},  # grown
        {"norm.bias": np.ones(9, np.float16)},  # of another type
        {"norm.bias": np.ones(2, np.float32), "head.bias": np.ones(7, np.float32)},
    ],
)
def test_the_index_tells_the_bytes_of_the_merged_model(
    extras: dict[str, Any], tmp_path: Path
) -> None:
    base = folder(tmp_path / "base", model(), 3)
    made = delta(base, Lora(rank=1), extras={n: RawTensor.copy_of(v) for n, v in extras.items()})
    merged(base, made)
    stated, held = total_size(tmp_path / "out")
    assert stated == held
    assert stated != json.loads((base / INDEX).read_bytes())["metadata"]["total_size"]
    weight_map = json.loads((tmp_path / "out" / INDEX).read_bytes())["weight_map"]
    assert set(weight_map) == set(Checkpoint.open(tmp_path / "out").names)


@pytest.mark.parametrize("metadata", [None, 7, "text", [1], {"more": 1}])
def test_an_index_whose_metadata_is_odd_gets_a_size(metadata: Any, tmp_path: Path) -> None:
    base = folder(tmp_path / "base", model(), 3)
    index = json.loads((base / INDEX).read_bytes())
    (base / INDEX).write_text(json.dumps({**index, "metadata": metadata}))
    extras = {"head.bias": RawTensor.copy_of(np.ones(7, np.float32))}
    merged(base, delta(base, Lora(rank=1), extras=extras))
    stated, held = total_size(tmp_path / "out")
    assert stated == held


def test_an_index_that_still_holds_stays_byte_for_byte(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", model(), 3)
    merged(base)
    assert (tmp_path / "out" / INDEX).read_bytes() == (base / INDEX).read_bytes()


# the configuration

LABELS = {0: "no", 1: "maybe", 2: "yes", 3: "always", 4: "never"}
CONFIG = {
    "architectures": ["BertForSequenceClassification"],
    "id2label": {str(index): label for index, label in LABELS.items()},
    "label2id": {label: index for index, label in LABELS.items()},
}


def with_head(base: Path, config: dict[str, Any] | None = None) -> Delta:
    """A delta of a bare encoder that brings a classifier of five labels."""
    from dataclasses import replace

    rng = np.random.default_rng(0)
    head = {
        "classifier.weight": RawTensor.copy_of(rng.normal(size=(5, pico.WIDTH)).astype(np.float32)),
        "classifier.bias": RawTensor.copy_of(rng.normal(size=5).astype(np.float32)),
    }
    made = delta(base, Lora(rank=2), patterns=Patterns(include=("encoder.*",)), extras=head)
    return replace(made, manifest=replace(made.manifest, config=config or {}))


@pytest.mark.parametrize("source", ["delta", "folder", "file"])
def test_a_new_head_opens_as_its_auto_class_with_its_labels(source: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    base = pico.bert(tmp_path / "base")
    made = with_head(base, CONFIG if source == "delta" else None)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    config = json.loads((base / "config.json").read_bytes()) | CONFIG
    (tuned / "config.json").write_text(json.dumps(config))
    given = {"folder": tuned, "file": tuned / "config.json"}.get(source)
    done = merge(base, made, tmp_path / "out", config=given)
    assert done.config == ("delta" if source == "delta" else "given")
    assert set(done.new) == {"classifier.bias", "classifier.weight"}
    auto = transformers.AutoModelForSequenceClassification
    opened, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(opened).__name__ == "BertForSequenceClassification"
    assert opened.config.id2label == LABELS
    assert opened.config.label2id == {label: index for index, label in LABELS.items()}
    weights = opened.state_dict()
    head = made.extras["classifier.weight"]
    assert weights["classifier.weight"].numpy().tobytes() == head.data.tobytes()
    name = "encoder.layer.0.attention.self.query.weight"
    assert (
        weights[f"bert.{name}"].numpy().tobytes()
        == Checkpoint.open(tmp_path / "out").data(name).tobytes()
    )


def test_a_configuration_that_needs_no_change_stays_byte_for_byte(base: Path) -> None:
    (base / "config.json").write_bytes(b'{"vocab_size":  30}\n\n')
    assert merged(base).config == "base"
    assert (base.parent / "out" / "config.json").read_bytes() == b'{"vocab_size":  30}\n\n'


@pytest.mark.parametrize("text", ["", "[]", "nonsense", "[" * 100_000])
def test_a_base_whose_configuration_is_no_object(base: Path, text: str) -> None:
    (base / "config.json").write_text(text)
    assert merged(base).config == "base"
    assert (base.parent / "out" / "config.json").read_text() == text


def test_configurations_that_make_no_sense_are_refused(base: Path, tmp_path: Path) -> None:
    made = delta(base, Lora(rank=1))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match="is no JSON object"):
        merge(base, made, tmp_path / "out", config=tmp_path / "list.json")
    with pytest.raises(InputError, match="is not a configuration file"):
        merge(base, made, tmp_path / "out", config=tmp_path / "nowhere")
    with pytest.raises(InputError, match="no place beside a single"):
        merge(base, made, tmp_path / "out.safetensors", config=base)
    assert listing(tmp_path) == {"base", "list.json", *(f"base/{name}" for name in PLAIN)}


def test_a_head_that_the_configuration_does_not_know_is_warned_of(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from kilodelta.cli import main

    base = pico.bert(tmp_path / "base")
    for name, config in (("old", None), ("new", CONFIG)):
        with_head(base, config).save(tmp_path / f"{name}.kd")
        given = ["merge", str(base), str(tmp_path / f"{name}.kd"), "-o", str(tmp_path / name)]
        done = CliRunner().invoke(main, given)
        assert done.exit_code == 0, done.output
        said = "brings classifier.bias, classifier.weight" in done.output
        assert said == (config is None), done.output


# tied embeddings

TIED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def random_table(seed: int) -> RawTensor:
    values = np.random.default_rng(seed).normal(size=(pico.VOCABULARY, pico.WIDTH))
    return RawTensor.copy_of(values.astype(np.float32))


def repeat_head(base: Path) -> Path:
    """Let a tied model's file hold its head, as FSDP, DeepSpeed and mergekit save it."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] = tensors[TIED].clone()
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


def tied(place: Path) -> Any:
    return json.loads((place / "config.json").read_bytes())["tie_word_embeddings"]


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("which", ["head", "table", "both"])
def test_a_head_that_was_tied_is_untied_in_the_configuration(
    which: str, repeated: bool, tmp_path: Path
) -> None:
    """As PEFT does when it merges one. The head comes out as the delta holds it."""
    transformers = pytest.importorskip("transformers")
    base = pico.llama(tmp_path / "base")
    if repeated:
        repeat_head(base)
    chosen = {"head": (HEAD,), "table": (TIED,), "both": (HEAD, TIED)}[which]
    extras = {name: random_table(seed) for seed, name in enumerate(chosen)}
    made = delta(base, Lora(rank=1), patterns=Patterns(include=("*.q_proj.*",)), extras=extras)
    merge(base, made, tmp_path / "out")
    is_tied = which == "table" and not repeated  # then there is no second matrix
    assert tied(tmp_path / "out") is is_tied
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state, source = opened.state_dict(), Checkpoint.open(tmp_path / "out")
    for name in (TIED, TIED if is_tied else HEAD):
        assert state[name].numpy().tobytes() == source.data(name).tobytes()
    assert is_tied == (state[HEAD].data_ptr() == state[TIED].data_ptr())


@pytest.mark.parametrize("target", [HEAD, TIED])
def test_a_target_of_a_repeated_pair_unties_it(target: str, tmp_path: Path) -> None:
    base = repeat_head(pico.llama(tmp_path / "base"))
    merge(base, delta(base, Lora(rank=1), patterns=Patterns(include=(target,))), tmp_path / "out")
    assert tied(tmp_path / "out") is False


def test_what_stays_tied_stays_so_in_the_configuration(tmp_path: Path) -> None:
    base = repeat_head(pico.llama(tmp_path / "base"))
    made = delta(base, Lora(rank=1), patterns=Patterns(include=("*.q_proj.*",)))
    merge(base, made, tmp_path / "untouched")
    assert tied(tmp_path / "untouched") is True
    equal = random_table(1)
    both = {HEAD: equal, TIED: equal}
    patterns = Patterns(include=("*.q_proj.*",))
    merge(base, delta(base, Lora(rank=1), patterns=patterns, extras=both), tmp_path / "alike")
    assert tied(tmp_path / "alike") is True


def test_the_inner_configuration_of_a_multimodal_model_is_untied(tmp_path: Path) -> None:
    base = pico.llama(tmp_path / "base")
    inner = json.loads((base / "config.json").read_bytes())
    outer = {"model_type": "llava", "text_config": inner}
    (base / "config.json").write_text(json.dumps(outer))
    extras = {HEAD: random_table(3)}
    made = delta(base, Lora(rank=1), patterns=Patterns(include=("*.q_proj.*",)), extras=extras)
    merge(base, made, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert found["text_config"]["tie_word_embeddings"] is False
    assert found["tie_word_embeddings"] is False


def test_a_tensor_starts_towards_the_disk_once_it_is_written(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, in whole: what is left to the end is waited for with the cores idle."""
    pushed: list[tuple[int, int]] = []

    def begin_sync(descriptor: int, begin: int, count: int) -> None:
        assert any(os.pread(descriptor, count, begin))
        pushed.append((begin, begin + count))

    monkeypatch.setattr(system, "begin_sync", begin_sync)
    merged(base)
    shard = Checkpoint.open(base.parent / "out").shards[0]
    entries = {(entry.begin, entry.begin + entry.nbytes) for entry in shard.layout.entries}
    assert sorted(pushed) == sorted(entries)
