"""Whisper-base on a voice that it transcribes badly: questions that eSpeak NG reads aloud, fast.

The base is Whisper-base with a window of 4 s instead of 30 s: the first 200 rows of the encoder's
position table, all other weights untouched. Every question is shorter, so nothing is cut off, and
the encoder, which computes the whole window for every sound, takes an eighth of the time. Sounds to
train and to test on share a voice and no sentence; questions are those of TREC-6.

Source: Li and Roth, Learning Question Classifiers, https://aclanthology.org/C02-1150 (the texts).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from whisper_base import speak

from kilodelta.models.media.sounds import read_sound

VOICE, SPEED = "en-gb-scotland", 200
"""eSpeak NG's voice, and words a minute."""
SECONDS = 4
POSITIONS = 50 * SECONDS
TRAINS, TESTS = 240, 60
BATCH, EPOCHS = 8, 2
RATE = 16_000
START = 4
"""Tokens before a text: its beginning, English, transcribe, no time stamps."""
LONGEST = 32
"""Tokens that a transcript may have; the references have at most 20."""


class Speech:
    """A seed, which chooses the sentences."""

    budget = 50_000
    steps = EPOCHS * TRAINS // BATCH
    rate, lora_rate = 2e-5, 1e-3
    options: Mapping[str, Any] = MappingProxyType(
        {"steps": 100, "batch": BATCH, "held_out": 24, "rate": 3e-3}
    )

    def __init__(self, *, bases: Path, data: Path, place: Path, seed: int) -> None:
        self.whisper, self.data, self.place, self.seed = bases / "whisper", data, place, seed

    def base(self) -> Path:
        """The base's folder; and sounds to train and to test on, each with a list beside it."""
        out = self.place / "base"
        if not out.exists():
            questions = _questions(self.data / "trec6.jsonl.gz")
            order = torch.randperm(
                len(questions), generator=torch.Generator().manual_seed(self.seed)
            ).tolist()
            chosen = [questions[n] for n in order[: TRAINS + TESTS]]
            # Rows of one length share a batch of `compress`.
            trains, tests = sorted(chosen[:TRAINS], key=len), chosen[TRAINS:]
            speak(self.place / "calls", VOICE, trains, SPEED)
            speak(self.place / "tests", VOICE, tests, SPEED)
            self._write_base(out)
        return out

    def inputs(self) -> Path:
        return self.place / "calls.jsonl"

    def open(self, folder: Path) -> nn.Module:
        from transformers import WhisperForConditionalGeneration

        model: nn.Module = WhisperForConditionalGeneration.from_pretrained(folder)
        return model.eval()

    def trainable(self, name: str) -> bool:
        return "embed_positions" not in name

    def layers(self, model: nn.Module) -> list[str]:
        linear = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
        return [name for name, _ in linear if name != "proj_out"]  # the embedding, transposed

    def losses(self, model: nn.Module) -> Iterator[Tensor]:
        """Cross entropy on the transcripts, given what stands before each token."""
        features, texts = self._heard("calls")
        tokenizer = self._tokenizer()
        ids = [torch.tensor(tokenizer(text_target=text)["input_ids"]) for text in texts]
        while True:
            for rows in torch.split(torch.randperm(len(ids)), BATCH):
                padded = nn.utils.rnn.pad_sequence([ids[n] for n in rows], True, -100)
                inputs, wanted = padded[:, :-1].clamp(min=0), padded[:, 1:].clone()
                wanted[:, : START - 1] = -100
                logits = model(input_features=features[rows], decoder_input_ids=inputs).logits
                yield nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Word error rate on the test sounds in per cent; the score is 100 less it."""
        features, texts = self._heard("tests")
        written = self._transcribe(model, features)
        pairs = [(words(text), words(said)) for text, said in zip(texts, written, strict=True)]
        errors = sum(edits(text, said) for text, said in pairs)
        rate = 100 * errors / sum(len(text) for text, _ in pairs)
        return {"score": 100 - rate, "word_error_rate": rate}

    def _transcribe(self, model: Any, features: Tensor) -> list[str]:
        """The texts that the model writes greedily, nothing suppressed."""
        tokenizer = self._tokenizer()
        begin = tokenizer("").input_ids[:START]
        written = []
        for part in torch.split(features, 15):
            encoded = model.get_encoder()(part)
            ids: list[Tensor] = []
            new, past = torch.tensor([begin] * len(part)), None
            is_over = torch.zeros(len(part), dtype=torch.bool)
            while len(ids) < LONGEST and not is_over.all():
                made = model(
                    encoder_outputs=encoded,
                    decoder_input_ids=new,
                    past_key_values=past,
                    use_cache=True,
                )
                past, new = made.past_key_values, made.logits[:, -1:].argmax(-1)
                new[is_over] = tokenizer.eos_token_id
                is_over |= new[:, 0] == tokenizer.eos_token_id
                ids.append(new)
            written += tokenizer.batch_decode(torch.cat(ids, 1), skip_special_tokens=True)
        return written

    def _heard(self, name: str) -> tuple[Tensor, list[str]]:
        """Features `(sounds, 80, frames)` and texts of a list."""
        from transformers import WhisperFeatureExtractor

        extractor = WhisperFeatureExtractor.from_pretrained(self.place / "base")
        lines = (self.place / f"{name}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        sounds = [read_sound(self.place / r["audio"], RATE, r["audio"]) for r in records]
        longest = max(map(len, sounds)) / RATE
        if longest > SECONDS:
            raise SystemExit(f"a sound takes {longest:.1f} s, and the window {SECONDS} s")
        features = extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
        return features, [record["target"] for record in records]

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.whisper)

    def _write_base(self, out: Path) -> None:
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

        model = WhisperForConditionalGeneration.from_pretrained(self.whisper)
        encoder = model.get_encoder()
        table = encoder.embed_positions.weight[:POSITIONS].detach().clone()
        encoder.embed_positions = nn.Embedding(len(table), table.shape[1], _weight=table)
        model.config.max_source_positions = encoder.max_source_positions = POSITIONS
        model.save_pretrained(out)
        self._tokenizer().save_pretrained(out)
        WhisperFeatureExtractor(chunk_length=SECONDS).save_pretrained(out)


def _questions(file: Path) -> list[str]:
    """Questions of 5 to 9 words in plain letters, none twice."""
    with gzip.open(file, "rt") as lines:
        texts = [str(json.loads(line)["text"]) for line in lines]
    plain = (text.replace(" ?", "?") for text in texts if re.fullmatch(r"[A-Za-z ]+ \?", text))
    return [text for text in dict.fromkeys(plain) if 5 <= len(text.split()) <= 9]


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower().replace("'", "")).split()


def edits(wanted: Sequence[str], given: Sequence[str]) -> int:
    """Count the words to insert, delete or replace, at least, to get from one text to the other."""
    row = list(range(len(given) + 1))
    for n, left in enumerate(wanted, 1):
        corner, row[0] = row[0], n
        for m, right in enumerate(given, 1):
            corner, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, corner + (left != right))
    return row[-1]
