"""What kilobytes keep of a fine-tune of a real model: DINOv2, Whisper and SmolLM2, a task each.

    python benchmarks/models.py --bases DIR --data DIR [--work DIR] [--json FILE] [--minutes N]
        [--tasks vision-16 vision-4 vision-1 speech decoder] [--seeds 0 1] [--cells base ..]

`--bases` holds the folders `dinov2`, `whisper` and `smollm2` that the converters beside this file
write; `--data` holds the data sets. `speech` needs espeakng-loader as well. For each task and seed,
all in one run:

- the base, and a full fine-tune of it on labelled examples (the teacher);
- the `.kd` file of the task's budget, which `compress` makes from the teacher and inputs alone;
- PEFT LoRA of rank 1 and 8, trained as the teacher was, on the same labels, its factors then
  rounded to 8 bits;
- NOLA and RandLoRA, trained as the teacher was, on the same labels, their coefficients rounded to 4
  bits in the last fifth of the steps, saved and merged as a `.kd` file near the budget;
- the truncated SVD of the teacher's change, of the same bytes as the `.kd` file.

Every finished cell and every teacher is kept in the work folder. With `--minutes`, no cell is begun
later than that, and the next run goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from fidelity_svd import merge_svd
from machine import describe
from tasks.decoder import Decoder
from tasks.speech import Speech
from tasks.vision import Vision
from torch import Tensor, nn

import kilodelta
from kilodelta import train as deltas
from kilodelta.compress import Options, compress
from kilodelta.models import open_model

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRAINED = ("nola-int4", "randlora-int4")
CELLS = ("base", "teacher", "kd", "svd", *TRAINED, "lora-r1-int8", "lora-r8-int8")
TASKS: Mapping[str, Callable[..., Task]] = {
    "vision-16": lambda **given: Vision(shots=16, **given),
    "vision-4": lambda **given: Vision(shots=4, **given),
    "vision-1": lambda **given: Vision(shots=1, **given),
    "speech": Speech,
    "decoder": Decoder,
}


class Task(Protocol):
    """What a task of a base says about itself; `place` is a folder for whatever it writes."""

    budget: int
    steps: int
    rate: float
    lora_rate: float
    options: Mapping[str, Any]

    def base(self) -> Path:
        """Write the base's folder and the inputs beside it, where they are missing."""

    def inputs(self) -> Path:
        """The unlabelled inputs that `compress` is given."""

    def open(self, folder: Path) -> nn.Module:
        """The module, in evaluation mode, float32."""

    def trainable(self, name: str) -> bool:
        """Whether a full fine-tune changes this parameter."""

    def layers(self, model: nn.Module) -> list[str]:
        """Names of the linear layers that a LoRA changes."""

    def losses(self, model: nn.Module) -> Iterator[Tensor]:
        """The loss of one batch after the other, without end."""

    def score(self, model: nn.Module) -> dict[str, float]:
        """Figures on examples that nothing was trained on; `score` grows as the model improves."""


def main() -> None:
    """Compute the cells that are missing, and print one table for each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--bases", type=Path, default=Path(), help="folder that holds dinov2, whisper, smollm2"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="folder with the data sets")
    parser.add_argument("--work", type=Path, default=Path("models"), help="teachers and files")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tuple(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=CELLS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell later")
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    tasks: dict[str, dict[str, Any]] = {}
    for seed in given.seeds:  # every task once first, so that an early end leaves whole columns
        for name in given.tasks:
            place = given.work / f"{name}-{seed}"
            place.mkdir(parents=True, exist_ok=True)
            task = TASKS[name](bases=given.bases, data=given.data, place=place, seed=seed)
            tasks.setdefault(name, {})[str(seed)] = _run(task, place, seed, given.cells, until)
    report = {"machine": describe(), "threads": torch.get_num_threads(), "tasks": tasks}
    for name, seeds in tasks.items():
        _print(name, seeds)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(report, indent=1) + "\n")


def _run(
    task: Task, place: Path, seed: int, cells: tuple[str, ...], until: float
) -> dict[str, dict[str, Any]]:
    """The cells of a task and seed that are done, after computing what time allows."""
    done = {}
    for name in (name for name in CELLS if name in cells):
        kept = place / f"{name}.json"
        if not kept.exists() and time.monotonic() < until:
            print(f"{place.name}: {name} ...", flush=True)
            began = time.monotonic()
            figures = _cell(task, place, seed, name)
            figures["seconds"] = round(time.monotonic() - began, 1)
            kept.write_text(json.dumps(figures))
            print(f"{place.name}: {name} {figures}", flush=True)
        if kept.exists():
            done[name] = json.loads(kept.read_text())
    return done


def _cell(task: Task, place: Path, seed: int, name: str) -> dict[str, Any]:
    base, teacher = task.base(), place / "teacher"
    if name == "base":
        return {**task.score(task.open(base))}
    if name == "teacher":
        if not teacher.exists():
            train_teacher(task, base, teacher, seed)
        return {**task.score(task.open(teacher))}
    if name == "svd":
        model = task.open(base)
        layers = set(task.layers(model))
        spent = merge_svd(model, task.open(teacher), task.budget, layers.__contains__)
        return {**task.score(model), "bytes": spent}
    if name in TRAINED:
        return _random_bases(task, place, seed, name)
    if name.startswith("lora-r"):
        return _lora(task, base, seed, rank=int(name.split("-")[1][1:]))
    return _compress(task, place, seed)


def train_teacher(task: Task, base: Path, out: Path, seed: int) -> None:
    """Fine-tune every parameter that the task allows, and save what transformers saves."""
    torch.manual_seed(seed)
    model = task.open(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(task.trainable(name))
    train(task, model, task.rate)
    unfinished = out.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(base, unfinished)  # tokenizer, processor
    model.save_pretrained(unfinished)  # type: ignore[operator]
    unfinished.rename(out)


def train(
    task: Task, model: nn.Module, rate: float, finish: Callable[[], object] = lambda: None
) -> None:
    """AdamW on what has gradients; a tenth of the steps warms up, then the rate falls to 0.

    `finish` is called before the last fifth of the steps.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warm, steps = max(1, task.steps // 10), task.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min((s + 1) / warm, (steps - s) / (steps - warm))
    )
    began = time.monotonic()
    for step, loss in zip(range(steps), task.losses(model), strict=False):
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step + 1 == steps - steps // 5:
            finish()
        if step % 10 == 9:
            seconds = time.monotonic() - began
            print(f"  step {step + 1} of {steps}: {loss.item():.3f}, {seconds:.0f} s", flush=True)


def _lora(task: Task, base: Path, seed: int, rank: int) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = task.open(base)
    names = task.layers(model)
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0)
    adapted: Any = get_peft_model(model, settings)
    train(task, adapted, task.lora_rate)
    spent = sum(_round_to_int8(p) for n, p in adapted.named_parameters() if ".lora_" in n)
    return {**task.score(adapted.merge_and_unload().eval()), "bytes": spent}


def _random_bases(task: Task, place: Path, seed: int, name: str) -> dict[str, Any]:
    """Coefficients of random bases, trained on labels; the file's bytes, and its merge's figures.

    Sources: Koohpayegani et al., NOLA, https://arxiv.org/abs/2310.02556; Albert et al., RandLoRA,
    https://arxiv.org/abs/2502.00987.
    """
    torch.manual_seed(seed)
    file, merged = place / f"{name}.kd", place / f"{name}-merged"
    model = task.open(task.base())
    weights = [f"{layer}.weight" for layer in task.layers(model)]
    method = _of_budget(task.budget, [tuple(model.get_parameter(w).shape) for w in weights], name)
    names = open_model(task.base()).names
    stored = {state: stored for stored, state in names.items()}
    deltas.attach(model, method, [stored[w] for w in weights], seed=seed, names=names)
    train(task, model, method.rate, lambda: deltas.quantise(model, 4))
    spent = deltas.save(model, file, base=task.base())
    shutil.rmtree(merged, ignore_errors=True)
    kilodelta.merge(task.base(), file, merged)
    figures = task.score(task.open(merged))
    shutil.rmtree(merged)
    return {**figures, "bytes": spent, "method": repr(method)}


def _of_budget(budget: int, shapes: list[tuple[int, ...]], name: str) -> Any:
    """NOLA of rank 8, or RandLoRA of the least rank, with as many coefficients as fit into it.

    A RandLoRA of full rank, its smallest, may still take more bytes than the budget.
    """
    coefficients = 2 * (budget - 2000)  # two in a byte, and 2 kB for the header
    if name.startswith("nola"):
        return deltas.Nola(rank=8, bases=coefficients // (2 * len(shapes)))
    sides = [min(shape) for shape in shapes]
    ranks = range(8, min(sides), 8)
    sizes = (sum(side * (-(-side // rank)) + side for side in sides) for rank in ranks)
    fitting = [rank for rank, size in zip(ranks, sizes, strict=True) if size <= coefficients]
    return deltas.RandLora(rank=min(fitting, default=min(sides)))


@torch.no_grad()
def _round_to_int8(factor: Tensor) -> int:
    """Round a LoRA factor to 8 bits, one float16 scale for each rank; returns its bytes."""
    ranks = factor if factor.shape[0] <= factor.shape[1] else factor.T
    scales = (ranks.abs().amax(1, keepdim=True) / 127).half().float().clamp(min=2**-24)
    ranks.copy_((ranks / scales).round().clamp(-127, 127) * scales)
    return factor.numel() + 2 * len(ranks)


def _compress(task: Task, place: Path, seed: int) -> dict[str, Any]:
    """A file as `kilodelta compress` makes it, or has made it here, merged and tested."""
    file, merged = place / "kd.kd", place / "kd-merged"
    if not file.exists():
        options = Options(budget=task.budget, seed=seed, **task.options)
        compress(
            task.base(),
            place / "teacher",
            file,
            inputs=task.inputs(),
            options=options,
            resume=file.with_name(f"{file.name}.resume").exists(),  # stopped by a time limit
        )
    shutil.rmtree(merged, ignore_errors=True)
    kilodelta.merge(task.base(), file, merged)
    figures = task.score(task.open(merged))
    shutil.rmtree(merged)
    made = kilodelta.inspect(file)
    return {
        **figures,
        "bytes": file.stat().st_size,
        "method": dict(made.method),
        "made": dict(made.made or {}),
    }


def _print(name: str, seeds: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each cell: score, share of the fine-tune's gain, bytes; seeds side by side."""
    print(f"\n{name}: score on unseen examples, share of the full fine-tune's gain, bytes")
    for cell in CELLS:
        shown = []
        for cells in seeds.values():
            if cell not in cells:
                shown.append("not run")
                continue
            share = ""
            if "base" in cells and "teacher" in cells:
                low, high = cells["base"]["score"], cells["teacher"]["score"]
                share = f" {100 * (cells[cell]['score'] - low) / (high - low):.0f} %"
            shown.append(f"{cells[cell]['score']:.2f}{share} {cells[cell].get('bytes', '')}")
        print(f"  {cell:<13} " + " / ".join(shown))


if __name__ == "__main__":
    main()
