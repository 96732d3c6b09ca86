"""Join the processes that torchrun has started, each on its GPU, and refuse what cannot work so.

Nothing here starts processes: torchrun does, and says by environment variables who is who.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from kilodelta.compress.distill.processes.ranks import ALONE, Ranks
from kilodelta.errors import InputError, one_line

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for values of another that has not ended, and does not answer. One that
has ended is noticed at once. torch's own limit is 30 minutes."""
PATIENCE = timedelta(hours=6)
"""How long the others wait while the first measures the weights of all targets and writes."""


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun has started, for as long as this block takes.

    Raises:
        InputError: the environment names processes that cannot be reached.
    """
    count = _environment("WORLD_SIZE", 1)
    if count == 1 or not dist.is_available():
        yield ALONE
        return
    began = not dist.is_initialized()
    if began:
        # Objects (rows, counts) travel by gloo also where gradients travel by nccl.
        both = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(both, timeout=TIMEOUT)
        except (RuntimeError, ValueError) as problem:
            raise InputError(
                f"the {count} processes of WORLD_SIZE cannot be joined: {one_line(problem)}",
                fix="start them by torchrun --standalone --nproc-per-node=N -m kilodelta ...",
            ) from problem
    try:
        patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Ranks(rank=dist.get_rank(), count=dist.get_world_size(), patient=patient)
    finally:
        if began:
            dist.destroy_process_group()


def require_alone(what: str, fix: str) -> None:
    """Refuse several processes for what one has to do.

    Args:
        what: what is done, as the subject of a sentence.
        fix: how it is done by one.

    Raises:
        InputError: torchrun has started several.
    """
    count = _environment("WORLD_SIZE", 1)
    if count > 1:
        raise InputError(f"{what} is made by one process, and torchrun started {count}", fix=fix)


def check_share(ranks: Ranks, batch: int, *, quantised: bool = False) -> None:
    """Check that several processes can share a compression, and each has rows to compute.

    Raises:
        InputError: there are more processes than rows, or the base is quantised.
    """
    if ranks.count > 1 and quantised:
        raise InputError(
            "a quantised base is compressed by one process",
            fix="run it without torchrun, or give the float model as BASE",
        )
    if ranks.count > batch:
        raise InputError(
            f"{ranks.count} processes share batches of {batch} inputs",
            fix=f"give --batch {ranks.count} or more, or start fewer processes",
        )


def device_of(ranks: Ranks, device: str) -> str:
    """Return the device of this process among several: on CUDA the GPU that torchrun counts.

    Raises:
        InputError: a GPU is named, which all processes would share; the machine has fewer GPUs
            than processes; or the device cannot exchange tensors.

    Example:
        >>> device_of(Ranks(rank=1, count=2), "cpu")
        'cpu'
    """
    if ranks.count == 1 or device == "cpu":
        return device
    if device.startswith("cuda:"):
        raise InputError(
            f"--device {device} would put all {ranks.count} processes on one GPU",
            fix="give --device cuda: each process takes the GPU of its number",
        )
    if device == "mps":
        raise InputError(
            "--device mps is one GPU, which several processes cannot share",
            fix="run it without torchrun, or give --device cpu",
        )
    if not torch.cuda.is_available():
        return device  # `auto` is the CPU then, and `cuda` is refused by name where it is opened
    number, gpus = _environment("LOCAL_RANK", 0), torch.cuda.device_count()
    if number >= gpus:
        raise InputError(
            f"process {number} of this machine has no GPU: torch sees {gpus}",
            fix=f"give --nproc-per-node={gpus}, or --device cpu",
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def _environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise
