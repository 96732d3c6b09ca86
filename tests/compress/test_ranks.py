"""One compression shared by several processes of torchrun."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor, nn

import kilodelta
from kilodelta.cli import main
from kilodelta.compress import Options, compress
from kilodelta.compress.distill import compress as compressing
from kilodelta.compress.distill import placement
from kilodelta.compress.distill.learn.gradient.collective import backward_shared
from kilodelta.compress.distill.placement import Placement, wants_shards
from kilodelta.compress.distill.processes import shards
from kilodelta.compress.distill.processes.launch import check_share, device_of, joined
from kilodelta.compress.distill.processes.ranks import ALONE, Ranks, one_voice
from kilodelta.compress.distill.processes.settle import for_processes
from kilodelta.compress.distill.processes.shards import (
    Parts,
    require_parts,
    require_room,
    sharded_by_layers,
)
from kilodelta.errors import InputError, OutputError
from kilodelta.files.checkpoint import Checkpoint
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

    def gather(self, value: Any, *, patient: bool = False) -> list[Any]:
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


def test_parts_are_dealt_so_that_all_make_equally_many_passes() -> None:
    for count, size in [(2, 5), (3, 2), (3, 6), (4, 1)]:
        dealt = [list(Ranks(rank=r, count=count).turns(range(size))) for r in range(count)]
        assert len({len(one) for one in dealt}) == 1
        assert sorted(part for one in dealt for part, own in one if own) == list(range(size))
    assert list(ALONE.turns(range(3))) == [(0, True), (1, True), (2, True)]


@pytest.mark.parametrize("piece", [1, 2, 3])
def test_pieces_of_shared_rows_have_the_whole_gradient_in_equally_many_passes(piece: int) -> None:
    """7 rows in 3 processes: 2, 2 and 3 of them."""
    weight = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    x = torch.arange(14, dtype=torch.float64).view(7, 2) / 10

    def loss_of(outputs: Mapping[str, Tensor]) -> Tensor:
        y = outputs["y"]
        loss: Tensor = y.exp().mean() / y.norm() + y[0] * y[-1]
        return loss

    loss_of({"y": x @ weight}).backward()  # type: ignore[no-untyped-call]

    def work(ranks: Ranks) -> tuple[int, Tensor | None]:
        own = weight.detach().clone().requires_grad_()
        passes = []

        def compute(rows: slice) -> dict[str, Tensor]:
            passes.append(rows)
            return {"y": x[rows] @ own}

        backward_shared(ranks, compute, loss_of, 7, [own], piece)
        return len(passes), own.grad

    for passes, gradient in in_threads(3, work):
        assert passes == {1: 6, 2: 4, 3: 1}[piece]
        assert gradient is not None
        assert weight.grad is not None
        assert torch.allclose(gradient, weight.grad, rtol=1e-12)


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError("no room"), MemoryError()])
def test_memory_that_runs_out_in_one_process_ran_out_in_all(problem: Exception) -> None:
    def work(ranks: Ranks) -> str:
        def compute(rows: slice) -> dict[str, Tensor]:
            if ranks.rank == 1:
                raise problem
            return {"y": torch.ones(rows.stop - rows.start, requires_grad=True)}

        with pytest.raises(torch.OutOfMemoryError):
            backward_shared(ranks, compute, lambda found: found["y"].sum(), 4, [])
        if ranks.rank == 1:  # where all wait in one pass, only its end can tell them
            stepping = replace(ranks, in_step=True)
            with pytest.raises(InputError, match="memory ran out in process 1"):
                backward_shared(stepping, compute, lambda found: found["y"].sum(), 4, [])
        return "done"

    assert in_threads(2, work) == ["done", "done"]


def test_an_error_of_any_is_one_of_all_and_travels() -> None:
    def work(ranks: Ranks) -> bool | None:
        def make() -> None:
            if ranks.rank == 1:
                raise pickle.loads(pickle.dumps(InputError("no room", fix="make some")))

        with pytest.raises(InputError, match="no room") as caught, one_voice(ranks):
            ranks.agree(make)
        assert caught.value.fix == "make some"
        return caught.value.is_local

    assert in_threads(2, work) == [False, False]
    with pytest.raises(InputError) as caught, one_voice(Ranks(rank=1, count=2)):
        raise InputError("mine", fix="alone")
    assert caught.value.is_local
    with pytest.raises(OutputError, match="has ended"), one_voice(Ranks(rank=1, count=2)):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer")


@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda:1", "put all 2 processes on one GPU"), ("mps", "several processes cannot share")],
)
def test_a_device_that_processes_cannot_share_is_refused(device: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        device_of(Ranks(rank=0, count=2), device)
    assert caught.value.fix
    assert device_of(ALONE, device) == device


def test_each_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of what torch says: two GPUs."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    two = Ranks(rank=3, count=4)
    assert device_of(two, "auto") == device_of(two, "cuda") == "cuda:1"
    assert device_of(two, "cpu") == "cpu"
    assert taken == [1, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="process 2 of this machine has no GPU: torch sees 2"):
        device_of(two, "auto")


def test_one_of_several_processes_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compress", "none", "none", "-o", "x.kd", "--bits", "16", "--method", "nola"]
    for rank in ("0", "1"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            main(arguments, standalone_mode=False)
        assert ended.value.code == InputError.exit_code
        assert ("error:" in capsys.readouterr().err) == (rank == "0")


def test_torchrun_s_signal_is_said_to_be_torchrun_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*models: str, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(compressing, "compress", stopped)
    arguments = ["compress", "base", "tuned", "-o", "x.kd", "--method", "lora"]
    for count, said in (("1", "error: interrupted"), ("2", "when one has ended")):
        monkeypatch.setenv("WORLD_SIZE", count)
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(SystemExit) as ended:
            main(arguments, standalone_mode=False)
        assert ended.value.code == 128 + signal.SIGTERM
        assert said in capsys.readouterr().err


def test_what_cannot_be_sharded_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Linear has no list of blocks of one class") as caught:
        require_parts(nn.Linear(2, 2))
    assert "--shard never" in caught.value.fix
    with (
        pytest.raises(InputError, match="computes with a layer's weights outside the layer"),
        sharded_by_layers(),
    ):
        raise RuntimeError("aten.mm.default: got mixed torch.Tensor and DTensor")
    with pytest.raises(RuntimeError, match="something else"), sharded_by_layers():
        raise RuntimeError("something else")


def test_one_process_has_nothing_to_shard(command: list[str], tmp_path: Path) -> None:
    base, tuned = command[3:5]
    options = Options(shard="always", device="cpu")
    with pytest.raises(InputError, match="--shard always needs several processes") as caught:
        compress(base, tuned, tmp_path / "x.kd", inputs=tmp_path / "texts.txt", options=options)
    assert "torchrun" in caught.value.fix
    two = Ranks(rank=0, count=2)
    both = replace(options, precisions=("int4-g32",))
    with pytest.raises(InputError, match="--for int4-g32 rounds whole weights"):
        for_processes(both, Path(base), two, learns=True)
    auto = for_processes(Options(device="cpu"), Path(base), two, learns=True)
    assert auto.shard == "never"  # on a CPU all processes map the same pages


def test_a_base_is_sharded_where_it_would_fill_half_of_a_gpu(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A double of what torch says about a GPU's memory."""
    base = Checkpoint.open(command[3])
    nbytes = sum(base.info(name).nbytes for name in base.names)
    gpu = Placement(device=torch.device("cuda"), dtype=torch.float32)
    for free, wanted in [(2 * nbytes, False), (2 * nbytes - 1, True)]:
        monkeypatch.setattr(placement, "available", lambda device, free=free: free)
        assert wants_shards(base, gpu) == wanted
        assert not wants_shards(base, replace(gpu, device=torch.device("cpu")))


def test_parts_that_memory_does_not_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(blocks=(), divided=8_000_000_000, whole=10**9, largest=5 * 10**8)
    monkeypatch.setattr(shards, "available", lambda device: 3 * 10**9)
    require_room(parts, Ranks(rank=0, count=8), torch.device("cuda"))
    with pytest.raises(InputError, match="a process takes 4 GB of sharded weights, and 3 GB are"):
        require_room(parts, Ranks(rank=0, count=4), torch.device("cuda"))
    with pytest.raises(InputError, match="machine's processes take 10 GB") as caught:
        require_room(parts, Ranks(rank=0, count=2), torch.device("cpu"))
    assert "--shard never" in caught.value.fix


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


def started(*command: str, rank: int, port: int, count: int = 2) -> subprocess.Popen[str]:
    """Start one process as torchrun would, without the seconds that torchrun takes."""
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_two_processes_hold_half_of_each_block_and_compute_as_one() -> None:
    port = free_port()
    runs = [started("-m", "tests.support.two_shards", rank=r, port=port) for r in range(2)]
    said = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    found = json.loads(said[0][0])
    # Per block 56 + 7 + 56 + 8 float32, of which one bias of 7 trains whole; whole are a scale of 8
    # per block, that bias, and the embedding of 88, which is the head as well.
    assert (found["divided"], found["whole"]) == (4 * (3 * 127 - 7), 4 * (3 * 8 + 7 + 88))
    # The first holds 4 of 7 rows, the second 3: (32 + 4 + 28 + 4) floats and (24 + 3 + 28 + 4).
    assert found["held"] == [found["whole"] + 4 * (3 * n - b) for n, b in [(68, 4), (59, 3)]]
    assert found["after a step"] == found["held"]
    assert found["gradients"] == 2 * 7 + 1  # alpha and beta of 3 x 2 matrices and the embedding
    for what in ("equal", "written", "changed", "as written"):
        assert found[what], what
    assert found["tied"] == ["embed.weight", "head.weight"]
    assert found["sharded"] == [True, False]
    assert found["freed"] == 0


SHARDED = ("--shard", "always")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [(), SHARDED])
def test_two_processes_make_what_one_does(
    shard: tuple[str, ...], command: list[str], tmp_path: Path
) -> None:
    found = []
    for name, start in (("one", ()), ("two", TORCHRUN)):
        options = shard if start else ()
        out = tmp_path / f"{name}.kd"
        done = subprocess.run(
            [sys.executable, *start, *command, "-o", str(out), "--steps", "20", "--json", *options],
            capture_output=True, text=True, check=False, env=environment(),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout))  # one process speaks
    one, two = found
    assert two["before"] == one["before"]
    # 4-bit coefficients take up what the order of float32 sums changes.
    assert (tmp_path / "two.kd").read_bytes() == (tmp_path / "one.kd").read_bytes()
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
steps.KEPT_EVERY_S = float(sys.argv[3])
options = Options(budget=3000, batch=8, device="cpu", steps=40, shard=sys.argv[2])
inputs = f"{folder}/texts.txt"
try:
    models = f"{folder}/base", f"{folder}/tuned"
    compress(*models, f"{folder}/out.kd", inputs=inputs, options=options)
except OutputError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["never", "always"])
def test_a_killed_process_ends_the_run_with_a_sentence(
    shard: str, command: list[str], tmp_path: Path
) -> None:
    port = free_port()
    runs = [started("-c", KILLED, str(tmp_path), shard, "99", rank=r, port=port) for r in range(2)]
    said = [run.communicate()[0] for run in runs]
    assert runs[1].returncode == -signal.SIGKILL
    assert "another process of this run has ended, so nothing more is written" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "texts.txt", "tuned"]


@pytest.mark.slow
def test_a_sharded_run_that_was_killed_goes_on_to_the_same_file(
    command: list[str], tmp_path: Path
) -> None:
    """The state is written at every step, and not left out of what the processes agree on."""
    port = free_port()
    runs = [
        started("-c", KILLED, str(tmp_path), "always", "0", rank=r, port=port) for r in range(2)
    ]
    ended = [run.communicate()[0] for run in runs]
    assert "nothing more is written" in ended[0]
    assert runs[1].returncode == -signal.SIGKILL
    assert (tmp_path / "out.kd.resume").exists()
    for name, more in (("out.kd", ["--resume"]), ("whole.kd", [])):
        port = free_port()
        whole = [*command, *SHARDED, "--steps", "40", "-o", str(tmp_path / name), *more]
        runs = [started(*whole, rank=r, port=port) for r in range(2)]
        said = [run.communicate()[1] for run in runs]
        assert [run.returncode for run in runs] == [0, 0], said
    assert (tmp_path / "out.kd").read_bytes() == (tmp_path / "whole.kd").read_bytes()
    assert not (tmp_path / "out.kd.resume").exists()
