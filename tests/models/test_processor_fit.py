"""A processor that is not the model's is refused by name, and not replaced by defaults."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.errors import InputError
from kilodelta.models import LoadedModel, open_model, read_inputs
from kilodelta.models.media.processor_fit import check_made
from tests.support import pico
from tests.support.seq2seq import whisper

Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")
transformers = pytest.importorskip("transformers")

FILE = "preprocessor_config.json"


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return open_model(whisper(tmp_path_factory.mktemp("whisper") / "base"))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = pico.vit(tmp_path_factory.mktemp("vit") / "base")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return open_model(folder)


def with_file(loaded: LoadedModel, folder: Path, text: str) -> LoadedModel:
    """The same model in a folder whose processor file is another."""
    shutil.copytree(loaded.source, folder)
    (folder / FILE).write_text(text)
    return dataclasses.replace(loaded, source=str(folder))


def sound(folder: Path) -> Path:
    place = folder / "a.wav"
    soundfile.write(place, np.sin(np.arange(8000) / 10), 16_000)
    return place


def photo(folder: Path) -> Path:
    place = folder / "a.png"
    Image.fromarray(np.full((12, 20, 3), 77, np.uint8)).save(place)
    return place


def saved(processor: Any) -> str:
    return json.dumps(processor.to_dict(), default=str)


def of_images() -> str:
    table = json.loads(saved(transformers.ViTImageProcessor()))
    return json.dumps({k: v for k, v in table.items() if k != "feature_extractor_type"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (lambda: "{}", "states nothing, and neither feature_extractor_type nor sampling_rate: "
         "transformers would take WhisperFeatureExtractor with its defaults"),
        (of_images, "neither feature_extractor_type nor sampling_rate"),
        (lambda: saved(transformers.WhisperFeatureExtractor(chunk_length=1)),
         "WhisperFeatureExtractor, makes 80 mel bins (input_features (80, 100)), and the model "
         "takes 8"),
        (lambda: saved(transformers.WhisperFeatureExtractor(feature_size=8)),
         "makes 3000 frames a sound (nb_max_frames), and the model takes 100"),
        (lambda: saved(transformers.WhisperFeatureExtractor(8, hop_length=320, chunk_length=1)),
         "makes 50 frames a sound"),
        (lambda: saved(transformers.Wav2Vec2FeatureExtractor()),
         "Wav2Vec2FeatureExtractor, makes input_values, and WhisperForConditionalGeneration takes "
         "input_features"),
    ],
    ids=["empty", "of images", "bins", "seconds", "hop", "of another model"],
)  # fmt: skip
def test_a_sound_and_a_wrong_processor(
    text: Callable[[], str], said: str, hearing: LoadedModel, tmp_path: Path
) -> None:
    loaded = with_file(hearing, tmp_path / "model", text())
    with pytest.raises(InputError) as error:
        read_inputs(sound(tmp_path), loaded)
    assert said in error.value.what
    assert "save the processor that the model was trained with" in error.value.fix


def test_an_old_file_that_names_no_class_is_read(hearing: LoadedModel, tmp_path: Path) -> None:
    """facebook/wav2vec2-base-960h states its rate, and no class."""
    table = json.loads(saved(transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)))
    del table["feature_extractor_type"]
    loaded = with_file(hearing, tmp_path / "model", json.dumps(table))
    assert read_inputs(sound(tmp_path), loaded)[0]["input_features"].shape == (1, 8, 100)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "neither image_processor_type nor size or image_mean"),
        ('{"sampling_rate": 16000, "feature_size": 1}', "states feature_size, sampling_rate, and"),
        ('{"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}',
         "pixel_values are 24 x 24, and"),
    ],
)  # fmt: skip
def test_an_image_and_a_wrong_processor(
    text: str, said: str, seeing: LoadedModel, tmp_path: Path
) -> None:
    loaded = with_file(seeing, tmp_path / "model", text)
    with pytest.raises(InputError) as error:
        read_inputs(photo(tmp_path), loaded)
    assert said in error.value.what
    assert "save the processor that the model was trained with" in error.value.fix


def test_a_model_that_takes_other_channels(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        image_size=16, patch_size=8, num_channels=1,
    )  # fmt: skip
    folder = pico.save(lambda: transformers.ViTForImageClassification(config), tmp_path / "grey")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    with pytest.raises(InputError, match=r"makes 3 channels of an image, and the model takes 1"):
        read_inputs(photo(tmp_path), open_model(folder))


def test_a_model_that_states_its_rate(hearing: LoadedModel) -> None:
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    stating: Any = copy.deepcopy(hearing.module)
    stating.config.sampling_rate = 24_000
    row = {"input_features": torch.zeros(1, 8, 100)}
    check_made(row, extractor, hearing)
    with pytest.raises(InputError, match=r"makes 16000 samples a second .*takes 24000"):
        check_made(row, extractor, dataclasses.replace(hearing, module=stating))
