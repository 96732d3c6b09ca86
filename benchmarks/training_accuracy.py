"""Accuracy at equal bytes: PEFT adapters rounded to int8 against kilodelta's files.

All-MiniLM-L6-v2 with the fixed head of `fidelity_task`, trained on the labels with one recipe:
AdamW, 32 texts a step, a tenth of the steps to warm up, then a linear decay. PEFT's numbers are
rounded to int8 with one float32 scale a tensor, and that is what is tested; their names and
configuration cost nothing here. Ours trains the last fifth of the steps with the file's own
rounding; what is tested is the merged file, and its bytes are all of the file's.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fidelity_task import (
    TEMPERATURE,
    Task,
    accuracy,
    base_folder,
    embed,
    embed_all,
    open_encoder,
    read_task,
    tokens,
)
from torch import nn
from training_methods import METHODS, VERA_RANK, ours

import kilodelta
from kilodelta.compress.training import train

EQUAL: Mapping[str, tuple[tuple[Any, int], ...]] = {
    "PEFT LoRA r = 1": (
        (train.Lora(rank=1), 8),
        (train.Lora(rank=2), 4),
        (train.Nola(rank=8, bases=512), 8),
        (train.Nola(rank=8, bases=1024), 4),
    ),
    "PEFT VeRA": ((train.Vera(rank=VERA_RANK), 8), (train.Nola(rank=8, bases=384), 8)),
    "PEFT LoRA r = 8": ((train.Lora(rank=8), 8), (train.Lora(rank=16), 4)),
}
"""Method and bits of files no larger than the adapter beside them, but for some hundred bytes; the
first is PEFT's own method, and both learn at its rate."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One set, and how long and from which seed to train on it."""

    task: Task
    steps: int
    seed: int

    def head(self) -> torch.Tensor:
        """The base's embeddings of the labels' names."""
        return embed_all(*open_encoder(base_folder()), self.task.names)

    def score(self, model: nn.Module, tokenizer: Any) -> float:
        """Test accuracy in per cent."""
        found = embed_all(model, tokenizer, self.task.test.texts)
        return round(accuracy(found, self.head(), self.task.test.labels), 2)


def compare(
    data: Path, sets: Sequence[str], against: Sequence[str], steps: int, seed: int
) -> dict[str, Any]:
    """Accuracy and bytes of PEFT's adapters and what is compared with them, on every set."""
    found: dict[str, Any] = {}
    for name in sets:
        bench = Bench(task=read_task(data / f"{name}.jsonl.gz"), steps=steps, seed=seed)
        found[name] = []
        for row in _rows(bench, against):
            print(f"{name}: {_line(row)}", file=sys.stderr, flush=True)
            found[name].append(row)
    return found


def _rows(bench: Bench, against: Sequence[str]) -> Iterator[dict[str, Any]]:
    for peft in against:
        rate = EQUAL[peft][0][0].rate
        yield {"what": f"{peft}, int8", "rate": rate, **_peft(bench, peft, rate)}
        for method, bits in EQUAL[peft]:
            rate = method.rate
            yield {"what": f"{method}, int{bits}", "rate": rate, **_ours(bench, method, bits, rate)}


def fit(
    bench: Bench, model: nn.Module, tokenizer: Any, rate: float, finish: Callable[[], None]
) -> None:
    """Train what has gradients; `finish` is called before the last fifth of the steps."""
    torch.manual_seed(bench.seed)
    head, train_set, steps = bench.head(), bench.task.train, bench.steps
    warm = max(1, steps // 10)
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, (steps - s) / (steps - warm))
    )
    for step in range(steps):
        if step == steps - steps // 5:
            finish()
        chosen = torch.randint(len(train_set.texts), (32,))
        batch = tokens(tokenizer, [train_set.texts[i] for i in chosen])
        logits = TEMPERATURE * embed(model, batch) @ head.T
        loss = nn.functional.cross_entropy(logits, train_set.labels[chosen])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()


def _peft(bench: Bench, name: str, rate: float) -> dict[str, Any]:
    base, tokenizer = open_encoder(base_folder())
    model = METHODS[name](base)
    fit(bench, model, tokenizer, rate, lambda: None)
    nbytes = _round(model)
    return {"accuracy": bench.score(model.eval(), tokenizer), "bytes": nbytes}


@torch.no_grad()
def _round(model: nn.Module) -> int:
    """Round every trained tensor to int8 in place; returns the bytes of numbers and scales."""
    nbytes = 0
    for tensor in (p for p in model.parameters() if p.requires_grad):
        scale = tensor.abs().max() / 127
        tensor.copy_((tensor / scale).round() * scale if scale > 0 else tensor)
        nbytes += tensor.numel() + 4
    return nbytes


def _ours(bench: Bench, method: Any, bits: int, rate: float) -> dict[str, Any]:
    base, tokenizer = open_encoder(base_folder())
    model = ours(base, method)
    fit(bench, model, tokenizer, rate, lambda: train.quantise(model, bits))
    with tempfile.TemporaryDirectory() as name:
        file, merged = Path(name) / "task.kd", Path(name) / "merged"
        nbytes = train.save(model, file, base=base_folder())
        kilodelta.merge(base_folder(), file, merged)
        return {"accuracy": bench.score(*open_encoder(merged)), "bytes": nbytes}


def print_accuracy(report: Mapping[str, list[dict[str, Any]]]) -> None:
    """One table a set."""
    for name, rows in report.items():
        print(f"\n{name}: test accuracy")
        for row in rows:
            print(_line(row))


def _line(row: Mapping[str, Any]) -> str:
    return f"{row['accuracy']:>6.1f} %  {row['bytes']:>9,} B  {row['what']}"
