"""Training in the loops that people have: Trainer, checkpointing, compile, DDP, several deltas."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import kilodelta
from kilodelta.compress.training import train
from kilodelta.format.methods import Lora, Method, Nola
from tests.support.training import EVERY, LAYERS, batch, classifier, rows

COMPILED = [
    pytest.param(method, id=method.name, marks=pytest.mark.slow if number else [])
    for number, method in enumerate(EVERY)
]
"""Compiling takes ten seconds each: all but one are for `--slow`."""


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_trainer_resumes_from_a_small_checkpoint_and_ends_at_the_same_bits(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def run(resume: Path | None) -> Any:
        torch.manual_seed(0)
        model = classifier(tmp_path, EVERY[0])
        arguments = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows(64))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return model

    whole = run(None)
    kept = tmp_path / "out" / "checkpoint-3"
    state = load_file(kept / "model.safetensors")
    assert not any(name.startswith("bert.") for name in state)  # the base is not in it
    resumed = run(kept)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not torch.equal(whole.state_dict()["classifier.weight"], state["classifier.weight"])
    base = tmp_path / "base"
    assert train.save(resumed, tmp_path / "task.kd", base=base) < 4000
    kilodelta.merge(base, tmp_path / "task.kd", tmp_path / "merged")


@pytest.mark.parametrize("method", EVERY, ids=lambda m: m.name)
def test_activation_checkpointing_changes_no_gradient(method: Method, tmp_path: Path) -> None:
    plain, sparing = (classifier(tmp_path, method).train() for _ in range(2))
    sparing.activation_checkpointing_enable()
    for _ in range(2):  # a second step must not find the first one's graph
        for model in (plain, sparing):
            model.zero_grad()
            model(**batch()).loss.backward()
        wanted, found = gradients(plain), gradients(sparing)
        assert wanted.keys() == found.keys()
        assert any("kilodelta" in name for name in wanted)
        for name, gradient in wanted.items():
            assert torch.equal(gradient, found[name]), name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks, we do not
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated")
@pytest.mark.parametrize("method", COMPILED)
def test_a_compiled_model_computes_and_learns_the_same(method: Method, tmp_path: Path) -> None:
    """Traced whole, before it ever ran; the backend runs the traced graph as it is, so the results
    are equal to float32 rounding."""
    model = classifier(tmp_path, method).train()
    train.quantise(model, 8)
    model = copy.deepcopy(model)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(**batch()).loss.backward()
    found = gradients(model)
    model.zero_grad()
    model(**batch()).loss.backward()
    wanted = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-4, atol=1e-7), name


def test_several_deltas_on_one_base(tmp_path: Path) -> None:
    base = classifier(tmp_path).eval()
    given = {name: value for name, value in batch().items() if name != "labels"}
    before = base(**given).logits
    outputs, attachments = [], []
    methods: list[Method] = [Nola(rank=2, bases=40), Lora(rank=2)]
    for seed, method in enumerate(methods):
        train.attach(base, method, LAYERS, exclude=["*LayerNorm*"], seed=seed)
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.data.add_(
                    0.05 * torch.sin(torch.arange(parameter.numel())).view_as(parameter)
                )
        outputs.append(base(**given).logits)
        attachments.append(train.detach(base))
        assert torch.equal(base(**given).logits, before)
    assert not torch.allclose(outputs[0], outputs[1])
    for attachment, output in zip(attachments, outputs, strict=True):
        train.switch(base, attachment)
        assert torch.equal(base(**given).logits, output)


WORKER = """
import os, sys, torch
sys.path[:0] = [{root!r}]
torch.set_num_threads(1)
from pathlib import Path
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tests.support.training import batch, classifier, EVERY
from kilodelta.compress.training import train

dist.init_process_group("gloo")
rank = dist.get_rank()
model = classifier(Path({folder!r}), EVERY[0], seed=4).train()
wrapped = DistributedDataParallel(model)
optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
whole = batch(16)
mine = {{name: value[8 * rank : 8 * rank + 8] for name, value in whole.items()}}
for _ in range(3):
    optimiser.zero_grad()
    wrapped(**mine).loss.backward()
    optimiser.step()
torch.save(model.state_dict(), Path({folder!r}) / f"rank{{rank}}.pt")
if rank == 0:
    train.save(model, Path({folder!r}) / "task.kd", base=Path({folder!r}) / "base")
dist.destroy_process_group()
"""


def test_two_processes_train_what_one_does_on_the_whole_batch(tmp_path: Path) -> None:
    single = classifier(tmp_path, EVERY[0], seed=4).train()
    optimiser = torch.optim.SGD([p for p in single.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        single(**batch(16)).loss.backward()
        optimiser.step()
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, value in single.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        # The mean of two halves' gradients and the whole's gradient: float32 sums in other orders.
        assert torch.allclose(states[0][name].float(), value.float(), rtol=1e-3, atol=1e-5), name
    kilodelta.merge(tmp_path / "base", tmp_path / "task.kd", tmp_path / "merged")
