"""SmolLM2-135M-Instruct answers what a question asks for: TREC-6, its labels written as text.

A prompt is a question of at most 40 tokens and the words "Answer type:"; the model has to go on
with the name of one of six classes and its end token. What counts is the exact match of the whole
greedy answer. `compress` is given the examples that the teacher was taught, so all had the same.

Source: Li & Roth 2002.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BATCH = 8
EXAMPLES = 320
TESTS = 150
LONGEST = 40
ENDING = "\nAnswer type:"
NAMES = {
    "ABBR": " abbreviation",
    "DESC": " description",
    "ENTY": " entity",
    "HUM": " human",
    "LOC": " location",
    "NUM": " number",
}


class Decoder:
    """A seed, which chooses the examples and their order."""

    budget = 50_000
    steps = 50
    rate, lora_rate = 5e-5, 1e-3
    options: Mapping[str, Any] = MappingProxyType(
        {"steps": 120, "batch": BATCH, "held_out": 40, "rate": 3e-3}
    )

    def __init__(self, *, bases: Path, data: Path, place: Path, seed: int) -> None:
        from transformers import AutoTokenizer

        self.folder, self.place, self.seed = bases / "smollm2", place, seed
        self.tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        with gzip.open(data / "trec6.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        rows = [row for row in rows if len(self._ids(row["text"])) <= LONGEST]
        self.train = [row for row in rows if row["split"] == "train"]
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        self.train = [self.train[n] for n in order[:EXAMPLES].tolist()]
        self.test = [row for row in rows if row["split"] == "test"][:TESTS]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def base(self) -> Path:
        """The converted base itself; the examples are written beside, for the commands."""
        for name, rows in (("train", self.train), ("test", self.test)):
            lines = [
                {"prompt": row["text"] + ENDING, "completion": NAMES[row["label"]]} for row in rows
            ]
            (self.place / f"{name}.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
        prompts = [row["text"] + ENDING for row in self.test[:BATCH]]
        tokens = self.tokenizer(prompts, padding=True, padding_side="right", return_tensors="np")
        names = ("input_ids", "attention_mask")
        np.savez(self.place / "prompts.npz", **{name: tokens[name] for name in names})
        return self.folder

    def inputs(self) -> Path:
        return self.place / "train.jsonl"

    def open(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.eval()

    def trainable(self, name: str) -> bool:
        return True

    def layers(self, model: nn.Module) -> list[str]:
        linear = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear))
        return [name for name, _ in linear if name != "lm_head"]

    def losses(self, model: nn.Module) -> Iterator[Tensor]:
        """Cross entropy of answer and end token."""
        while True:
            for rows in torch.split(torch.randperm(len(self.train)), BATCH):
                scores, wanted = self._answers(model, [self.train[n] for n in rows.tolist()])
                yield nn.functional.cross_entropy(scores[wanted >= 0], wanted[wanted >= 0])

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Exact matches, and the cross entropy of an answer, on the test questions.

        The greedy text is the label exactly if each token of the label, after those before it, has
        the highest score: one pass says it.
        """
        right, loss, count = 0, 0.0, 0
        for start in range(0, len(self.test), 2 * BATCH):
            part = self.test[start : start + 2 * BATCH]
            scores, wanted = self._answers(model, part)
            counts = wanted >= 0
            right += int(((scores.argmax(-1) == wanted) | ~counts).all(1).sum())
            loss += float(
                nn.functional.cross_entropy(scores[counts], wanted[counts]) * counts.sum()
            )
            count += int(counts.sum())
        return {"score": 100 * right / len(self.test), "loss": loss / count}

    def _answers(self, model: nn.Module, rows: list[dict[str, str]]) -> tuple[Tensor, Tensor]:
        """(rows, tokens, vocabulary) scores at the answers, (rows, tokens) answers, -100 beyond."""
        prompts = [self._ids(row["text"] + ENDING) for row in rows]
        answers = [[*self._ids(NAMES[row["label"]]), self.tokenizer.eos_token_id] for row in rows]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        longest = max(map(len, answers))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        at = torch.zeros(len(rows), longest, dtype=torch.long)
        wanted = torch.full((len(rows), longest), -100)
        for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            count = len(prompt) + len(answer)
            ids[n, :count] = torch.tensor(prompt + answer)
            mask[n, :count] = 1
            at[n, : len(answer)] = len(prompt) - 1 + torch.arange(len(answer))
            wanted[n, : len(answer)] = torch.tensor(answer)
        unwrapped: Any = getattr(model, "get_base_model", lambda: model)  # PEFT's wrapper has one
        decoder = unwrapped()
        states = decoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
        chosen = states[torch.arange(len(rows))[:, None], at]
        return decoder.lm_head(chosen), wanted
