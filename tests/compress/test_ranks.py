"""One compression shared by several processes of torchrun."""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor, nn

import kilodelta
from kilodelta.compress.distill.learn.ranks import (
    ALONE,
    Ranks,
    backward_shared,
    check_share,
    joined,
)
from kilodelta.errors import InputError
from tests.support import pico


@dataclass
class Meeting:
    """Where two threads that stand for processes exchange values."""

    count: int
    given: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count, timeout=60)


@dataclass(frozen=True, kw_only=True)
class Thread(Ranks):
    """A double: processes that are threads."""

    meeting: Meeting

    def gather(self, value: Any) -> list[Any]:
        self.meeting.given[self.rank] = value
        self.meeting.barrier.wait()
        found = [self.meeting.given[rank] for rank in range(self.count)]
        self.meeting.barrier.wait()
        return found

    def add_up(self, tensors: Any) -> None:
        for tensor in tensors:
            parts = self.gather(tensor.clone())
            tensor.copy_(torch.stack(parts).sum(0))


def in_threads(count: int, work: Any) -> list[Any]:
    """What each of so many ranks makes."""
    meeting, made = Meeting(count), [None] * count

    def one(rank: int) -> None:
        made[rank] = work(Thread(rank=rank, count=count, meeting=meeting))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


@pytest.mark.parametrize("count", [2, 3])
def test_shared_rows_have_the_gradient_of_the_whole_batch(count: int) -> None:
    """The loss is no sum over rows: it divides by the batch's norm and compares rows."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    x = torch.randn(8, 5, dtype=torch.float64)

    def loss_of(outputs: Mapping[str, Tensor]) -> Tensor:
        y = outputs["y"]
        loss: Tensor = (y @ y.T).exp().mean() / y.norm() + y[0].sum() * y[-1].sum()
        return loss

    loss_of({"y": module(x)}).backward()  # type: ignore[no-untyped-call]

    def work(ranks: Ranks) -> tuple[Tensor, list[Tensor]]:
        own = copy.deepcopy(module)
        own.zero_grad()
        trained = list(own.parameters())
        loss = backward_shared(ranks, lambda rows: {"y": own(x[rows])}, loss_of, 8, trained)
        return loss, [p.grad for p in trained if p.grad is not None]

    for loss, gradients in in_threads(count, work):
        assert loss.item() == pytest.approx(loss_of({"y": module(x)}).item(), rel=1e-6)
        for gradient, parameter in zip(gradients, module.parameters(), strict=True):
            assert parameter.grad is not None
            assert torch.allclose(gradient, parameter.grad, rtol=1e-12, atol=1e-14)


def test_an_error_of_the_first_is_one_of_all() -> None:
    def work(ranks: Ranks) -> str:
        def make() -> None:
            raise InputError("no room", fix="more")

        with pytest.raises(InputError, match="no room"):
            ranks.first(make)
        return ranks.first(lambda: f"made by {ranks.rank}")

    assert in_threads(2, work) == ["made by 0", "made by 0"]


def test_alone_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks is ALONE
    assert ranks.share(8) == slice(0, 8)
    assert ranks.gather(3) == [3]
    with pytest.raises(InputError, match="4 processes share batches of 3"):
        check_share(Ranks(rank=0, count=4), 3)
    with pytest.raises(InputError, match="a quantised base is compressed by one process"):
        check_share(Ranks(rank=0, count=2), 8, quantised=True)
    check_share(ALONE, 8, quantised=True)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A compression of a pico decoder, without its output and the processes."""
    base = pico.llama(tmp_path / "base")
    tuned = pico.tuned(base, tmp_path / "tuned", size=0.3)
    words = pico.WORDS.split()
    lines = [" ".join(words[(i * j) % len(words)] for j in range(1, 4 + i % 5)) for i in range(64)]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    options = ("--inputs", str(tmp_path / "texts.txt"), "--budget", "3KB", "--batch", "8")
    return ["-m", "kilodelta", "compress", str(base), str(tuned), *options, "--device", "cpu"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_two_processes_make_what_one_does(command: list[str], tmp_path: Path) -> None:
    found = []
    for name, start in (("one", ()), ("two", TORCHRUN)):
        out = tmp_path / f"{name}.kd"
        done = subprocess.run(
            [sys.executable, *start, *command, "-o", str(out), "--steps", "40", "--json"],
            capture_output=True, text=True, check=False, env=environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout))  # one process speaks
    one, two = found
    assert two["before"] == one["before"]
    assert two["after"]["divergence"] == pytest.approx(one["after"]["divergence"], rel=0.02)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base", "one.kd", "texts.txt", "tuned", "two.kd",
    ]  # fmt: skip
    merged = kilodelta.merge(tmp_path / "base", tmp_path / "two.kd", tmp_path / "merged")
    assert merged.path.exists()


KILLED = """
import os, signal, sys
from kilodelta.compress import Options, compress
from kilodelta.compress.distill.learn import steps
from kilodelta.errors import OutputError

folder, real = sys.argv[1], steps.Run.take

def take(self, chosen):
    if self.step == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, chosen)

steps.Run.take = take
options = Options(budget=3000, batch=8, device="cpu", steps=100)
inputs = f"{folder}/texts.txt"
try:
    models = f"{folder}/base", f"{folder}/tuned"
    compress(*models, f"{folder}/out.kd", inputs=inputs, options=options)
except OutputError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_sentence(command: list[str], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            stdout=subprocess.PIPE, text=True, env={**environment(), **place, "RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [run.communicate()[0] for run in runs]
    assert runs[1].returncode == -signal.SIGKILL
    assert "another process of this run has ended, so nothing more is written" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "texts.txt", "tuned"]
