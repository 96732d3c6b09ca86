"""Images, sounds and pairs as inputs: what processors make of them, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kilodelta.compress import Options, compress
from kilodelta.errors import InputError
from kilodelta.format.methods import Nola
from kilodelta.models import open_model, read_inputs
from kilodelta.models.media.processor_limits import check_processor_limits
from kilodelta.models.media.sounds import read_sound, resample
from tests.support import pico
from tests.support.seq2seq import t5, whisper

Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")

RATE = 16000


def vit(folder: Path) -> Path:
    """A vision transformer with the processor that it was made for."""
    from transformers import ViTImageProcessor

    pico.vit(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def picture(
    path: Path, mode: str = "RGB", *, seed: int = 0, size: tuple[int, int] = (20, 12)
) -> Path:
    chance = np.random.default_rng(seed)
    pixels = chance.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def tone(path: Path, *, seconds: float = 0.5, rate: int = RATE, hertz: float = 440) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(int(seconds * rate)) / rate
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * times), rate)
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_model(vit(tmp_path_factory.mktemp("vit") / "base"))


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_model(whisper(tmp_path_factory.mktemp("whisper") / "base"))


def test_a_folder_of_images(seeing: Any, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    first = picture(tmp_path / "a.png")
    second = picture(tmp_path / "b" / "c.JPG", seed=1, size=(9, 30))
    picture(tmp_path / ".hidden.png", seed=2)
    (tmp_path / "notes.txt").write_text("no image")
    (batch,) = read_inputs(tmp_path, seeing)
    processor = AutoImageProcessor.from_pretrained(seeing.source)
    images = [Image.open(place).convert("RGB") for place in (first, second)]
    expected = processor(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert len(read_inputs(tmp_path, seeing, limit=1)[0]["pixel_values"]) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "RGB"])
def test_modes_with_eight_bits_are_converted(mode: str, seeing: Any, tmp_path: Path) -> None:
    (batch,) = read_inputs(picture(tmp_path / "a.png", mode), seeing)
    assert batch["pixel_values"].shape == (1, 3, 16, 16)


def test_cmyk_is_converted(seeing: Any, tmp_path: Path) -> None:
    (batch,) = read_inputs(picture(tmp_path / "a.jpg", "CMYK"), seeing)
    assert batch["pixel_values"].shape == (1, 3, 16, 16)


def test_an_image_is_turned_upright(seeing: Any, tmp_path: Path) -> None:
    upright = picture(tmp_path / "a.png", size=(20, 10))
    image = Image.open(upright)
    tag = Image.Exif()
    tag[0x0112] = 6  # the camera was turned: show it by 270 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=tag)
    (batch,) = read_inputs(tmp_path, seeing)
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_are_refused(mode: str, seeing: Any, tmp_path: Path) -> None:
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    Image.fromarray(np.zeros((8, 8), kind)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="whose values have no fixed range"):
        read_inputs(tmp_path, seeing)


def test_what_is_no_image_is_named(seeing: Any, tmp_path: Path) -> None:
    whole = picture(tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cut\.png is no image that Pillow reads"):
        read_inputs(tmp_path / "cut.png", seeing)
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(
        InputError, match=r"text\.jpg is no image that Pillow reads: its bytes are of none of"
    ):
        read_inputs(tmp_path / "text.jpg", seeing)


def test_folders_that_cannot_be_inputs(seeing: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images and no sounds"):
        read_inputs(tmp_path, seeing)
    place = picture(tmp_path / "a.png")
    tone(tmp_path / "b.wav")
    with pytest.raises(InputError, match=r"images \(a\.png\) and sounds \(b\.wav\)"):
        read_inputs(tmp_path, seeing)
    (tmp_path / "b.wav").unlink()
    (tmp_path / "c.png").symlink_to(place)
    with pytest.raises(InputError, match=r"c\.png is a link"):
        read_inputs(tmp_path, seeing)


def test_images_that_a_file_lists(seeing: Any, tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "a.png")
    lines = tmp_path / "list.jsonl"
    lines.write_text('{"image": "photos/a.png"}\n{"image": "photos/a.png"}\n')
    (batch,) = read_inputs(lines, seeing)
    assert batch["pixel_values"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"image": "none.png"}', "none.png does not exist"),
        ('{"image": "' + 300 * "x" + '.png"}', "x.png does not exist"),
        ('{"image": 3}', "image is no path"),
        ('{"image": "a.png", "audio": "b.wav"}', "names an image and a sound"),
        ('{"image": "a.png", "target": "rain"}', "has no decoder to write one"),
        ('{"image": "a.png", "text": ""}', "text is no text"),
        ('{"target": "rain"}', "has no image, audio or text"),
    ],
)
def test_records_that_cannot_be_inputs(line: str, reason: str, seeing: Any, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    tone(tmp_path / "b.wav")
    lines = tmp_path / "list.jsonl"
    lines.write_text(line + "\n")
    with pytest.raises(InputError, match=reason):
        read_inputs(lines, seeing)


def test_records_that_differ(seeing: Any, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    lines = tmp_path / "list.jsonl"
    lines.write_text('{"image": "a.png"}\n{"image": "a.png", "text": "rain"}\n')
    with pytest.raises(InputError, match=r"list\.jsonl:2 holds image and text"):
        read_inputs(lines, seeing)


def test_a_model_without_a_processor(tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "a.png")
    with pytest.raises(InputError, match="has no processor for images") as caught:
        read_inputs(tmp_path / "photos", open_model(pico.vit(tmp_path / "vit")))
    assert "If you were trying to load" not in caught.value.what  # from a hub, which nobody was


def test_a_processor_for_something_else(seeing: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no processor for sounds|takes no sounds"):
        read_inputs(tone(tmp_path / "a.wav"), seeing)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": {"height": 20_000, "width": 8}}, "height is 20000, at most 4096 is taken"),
        ({"size": 5000}, "size is 5000, at most 4096"),
        ({"size": [8, 5000]}, "size is 5000, at most 4096"),
        ({"inner": [{"crop_size": {"shortest_edge": 1e9}}]}, "shortest_edge is 1000000000"),
        ({"unheard_of": 10**400}, "unheard_of is inf"),
        ({"image_std": [float("nan")]}, "image_std is inf"),
        ({"chunk_length": 30_000}, "chunk_length is 30000, at most 600"),
        (
            {"chunk_length": 30, "sampling_rate": 16_000, "n_fft": 400, "hop_length": 1},
            "n_fft is 192000000, at most 16777216",
        ),
    ],
)
def test_a_processor_that_asks_for_too_much(
    change: dict[str, Any], said: str, seeing: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(seeing.source, folder)
    place = folder / "preprocessor_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    loaded = dataclasses.replace(seeing, source=str(folder))
    with pytest.raises(InputError, match="asks for too much") as error:
        read_inputs(picture(tmp_path / "a.png"), loaded)
    assert said in error.value.what


def test_a_processor_of_the_sizes_that_are_in_use_is_modest(tmp_path: Path) -> None:
    table: dict[str, Any] = {
        "size": {"shortest_edge": 3136, "longest_edge": 12_845_056},  # Qwen2-VL: pixels of an area
        "model_max_length": 10**30,
        "feature_extractor": {  # Whisper
            "chunk_length": 30, "feature_size": 128, "hop_length": 160, "n_fft": 400,
            "n_samples": 480_000, "nb_max_frames": 3000, "sampling_rate": 16_000,
        },
    }  # fmt: skip
    (tmp_path / "processor_config.json").write_text(json.dumps(table))
    check_processor_limits(tmp_path)


def test_a_processor_without_a_rate(hearing: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(hearing.source, folder)
    place = folder / "preprocessor_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "sampling_rate": 0}))
    loaded = dataclasses.replace(hearing, source=str(folder))
    with pytest.raises(InputError, match="its sampling_rate is 0"):
        read_inputs(tone(tmp_path / "a.wav"), loaded)


def test_a_target_that_cannot_be_written_is_a_sentence(
    hearing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(**_: Any) -> Any:
        raise IndexError("index -1 is out of bounds")  # as transformers does, given NaN

    monkeypatch.setattr(hearing.module, "generate", generate)
    with pytest.raises(InputError, match="cannot write a target: index -1"):
        read_inputs(tone(tmp_path / "a.wav"), hearing)


@pytest.mark.parametrize(
    ("rate", "frames", "channels"),
    [(1000, 3_000_000, 1), (RATE, 17_000_000, 2), (RATE, 34_000_000, 1)],
)
def test_a_small_file_of_a_long_sound(
    rate: int, frames: int, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silence packs to a thousandth, and a low rate makes many samples of each."""
    place = tmp_path / "a.flac"
    soundfile.write(place, np.zeros((10, channels), np.int16), rate)
    data = bytearray(place.read_bytes())
    data[22:26] = frames.to_bytes(4, "big")  # STREAMINFO's count of frames
    place.write_bytes(data)
    with pytest.raises(InputError, match="at most 33554432 are read"):
        read_sound(place, RATE, "x")


def test_a_sound_of_almost_no_rate(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(10), 2)
    with pytest.raises(InputError, match="sampled at 2 Hz, and 1000 at least"):
        read_sound(tmp_path / "a.wav", RATE, "x")


def test_an_image_whose_exif_is_damaged(seeing: Any, tmp_path: Path) -> None:
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    with pytest.raises(InputError, match="no image that Pillow reads: not a TIFF file"):
        read_inputs(tmp_path / "a.png", seeing)


def test_no_program_is_started_for_an_image(
    seeing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow hands EPS, whatever the file is called, to Ghostscript."""
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("it was started"))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(InputError, match="its bytes are of none of BMP, GIF"):
        read_inputs(tmp_path / "a.jpg", seeing)


def test_a_sound_at_another_rate(hearing: Any, tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor

    slow = tone(tmp_path / "slow.wav", rate=8000)
    (batch,) = read_inputs(slow, hearing)
    samples = 0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)
    expected = WhisperFeatureExtractor(feature_size=8, chunk_length=1)(
        samples, sampling_rate=RATE, return_tensors="pt"
    )["input_features"]
    assert batch["input_features"].shape == (1, 8, 100)
    # 16 bits, and the ends of the tone, are what is left of a difference.
    assert (batch["input_features"] - expected).abs().mean() < 0.05
    # No target: the model wrote one, from its start token on.
    assert batch["decoder_input_ids"][0, 0] == 2


def test_resampling_is_the_usual_one() -> None:
    signal = pytest.importorskip("scipy.signal")
    samples = np.random.default_rng(0).standard_normal(441).astype(np.float32)
    for own, wanted in ((44100, 16000), (8000, 16000), (16000, 16000), (16000, 8000)):
        for part in (samples, samples[:-1]):
            found = resample(part, own, wanted)
            expected = signal.resample(part.astype(np.float64), len(found))
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_channels_are_averaged(hearing: Any, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (4000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "two.wav", samples, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "one.wav", samples.mean(axis=1), RATE, subtype="FLOAT")
    one, two = (read_inputs(tmp_path / f"{n}.wav", hearing)[0] for n in ("one", "two"))
    assert torch.allclose(one["input_features"], two["input_features"], atol=1e-5)


def test_sounds_that_cannot_be_heard(hearing: Any, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    with pytest.raises(InputError, match=r"empty\.wav holds no sound"):
        read_inputs(tmp_path / "empty.wav", hearing)
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(InputError, match="holds NaN or infinity"):
        read_inputs(tmp_path / "nan.wav", hearing)
    tone(tmp_path / "long.wav", seconds=1.5)
    with pytest.raises(InputError, match=r"is 1\.5 s long, and the model hears 1 s"):
        read_inputs(tmp_path / "long.wav", hearing)
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(InputError, match=r"text\.wav is no sound that can be read: Format"):
        read_inputs(tmp_path / "text.wav", hearing)


def test_pairs_are_taught_with_the_target_given(tmp_path: Path) -> None:
    loaded = open_model(t5(tmp_path / "base"))
    lines = tmp_path / "pairs.jsonl"
    lines.write_text(
        '{"text": "rain", "target": "seven birds watch"}\n{"text": "a river", "target": "rain"}\n'
    )
    first, second = read_inputs(lines, loaded)  # of several lengths: nothing is padded
    ids = loaded.tokenizer("seven birds watch")["input_ids"]
    assert first["decoder_input_ids"].tolist() == [[0, *ids[:-1]]]
    assert first["input_ids"].tolist() == [loaded.tokenizer("rain")["input_ids"]]
    assert second["decoder_input_ids"].shape[1] < first["decoder_input_ids"].shape[1]


def test_a_target_beyond_the_positions(hearing: Any, tmp_path: Path) -> None:
    tone(tmp_path / "a.wav")
    lines = tmp_path / "list.jsonl"
    lines.write_text('{"audio": "a.wav", "target": "' + "rain " * 30 + '"}\n')
    with pytest.raises(InputError, match=r"a target of 3\d tokens, and .* takes 20"):
        read_inputs(lines, hearing)


def test_compress_on_a_folder_of_photos(tmp_path: Path) -> None:
    base = vit(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.1)
    for n in range(12):
        picture(tmp_path / "photos" / f"{n:02}.png", seed=n)
    options = Options(method=Nola(rank=2, bases=8), steps=3)
    report = compress(base, tuned, tmp_path / "a.kd", inputs=tmp_path / "photos", options=options)
    assert report.targets


def test_compress_on_a_folder_of_calls(tmp_path: Path) -> None:
    base = whisper(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.1)
    for n in range(12):
        tone(tmp_path / "calls" / f"{n:02}.wav", hertz=200 + 50 * n)
    options = Options(method=Nola(rank=2, bases=8), steps=3)
    report = compress(base, tuned, tmp_path / "a.kd", inputs=tmp_path / "calls", options=options)
    assert report.targets
