"""Shard a model's frozen blocks among the processes: each holds a part of every matrix's rows.

FSDP2 (`torch.distributed.fsdp.fully_shard`): each block (a decoder or encoder layer) is a unit,
whose whole weights exist while it computes and are dropped after it, forward and backward. A layer
therefore sees plain weights, and an update is applied to them as ever. What lies outside the
blocks (embeddings, the last norm, a head), what several blocks share, and what trains whole, is
held by every process.

The weights are the mapped file's own pages until a block is sharded, so that no process holds the
whole base: of each matrix it reads its own rows (on a GPU, one block at a time passes through).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from kilodelta.compress.distill.pair import Pair
from kilodelta.compress.distill.planning.memory import available
from kilodelta.compress.distill.processes.ranks import Ranks
from kilodelta.compress.training.activations import blocks_of
from kilodelta.compress.training.layers import mark_sharded
from kilodelta.errors import InputError, one_line
from kilodelta.models.weights import local
from kilodelta.sizes import byte_label


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What sharding would divide.

    Attributes:
        blocks: the units, each once.
        divided: bytes of the parameters that are divided among the processes.
        whole: bytes of those that every process holds.
        largest: bytes of the largest block's divided ones, which exist whole while it computes.
    """

    blocks: tuple[nn.Module, ...]
    divided: int
    whole: int
    largest: int

    def per_process(self, count: int) -> int:
        """Return the bytes that a process holds at most: its part, and two blocks at work.

        Example:
            >>> Parts(blocks=(), divided=800, whole=50, largest=100).per_process(4)
            450
        """
        return self.whole + -(-self.divided // count) + 2 * self.largest


def parts_of(module: nn.Module, kept: Collection[str] = ()) -> Parts:
    """Judge what of a module can be sharded.

    Args:
        module: nothing is attached to it.
        kept: state names of parameters that train, which every process needs whole.
    """
    blocks = tuple(dict.fromkeys(blocks_of(module)))
    ignored = _held_whole(module, blocks, kept)
    sizes = [sum(p.nbytes for p in block.parameters() if p not in ignored) for block in blocks]
    divided = sum(sizes)
    every = sum(parameter.nbytes for parameter in module.parameters())
    return Parts(
        blocks=blocks, divided=divided, whole=every - divided, largest=max(sizes, default=0)
    )


def require_parts(module: nn.Module, kept: Collection[str] = ()) -> Parts:
    """Judge a module as `parts_of` does, and refuse one of which nothing can be divided.

    Raises:
        InputError: it repeats no blocks.
    """
    parts = parts_of(module, kept)
    if not parts.divided:
        raise InputError(
            f"{type(module).__name__} has no list of blocks of one class, so its weights cannot be"
            " sharded",
            fix="give --shard never: each process then holds the base",
        )
    return parts


def _held_whole(
    module: nn.Module, blocks: Collection[nn.Module], kept: Collection[str]
) -> set[nn.Parameter]:
    """Choose the parameters that every process holds: see the module's docstring.

    A block's own parameters, beside those of its layers, are among them: a hook that computes with
    them may read them before the block has them whole.
    """
    inside = {id(part) for block in blocks for part in block.modules()}
    uses = Counter(parameter for block in blocks for parameter in block.parameters())
    named = dict(module.named_parameters(remove_duplicate=False))
    outside = [part for part in module.modules() if id(part) not in inside]
    return {
        *(parameter for part in outside for parameter in part.parameters(recurse=False)),
        *(parameter for parameter, count in uses.items() if count > 1),
        *(parameter for block in blocks for parameter in block.parameters(recurse=False)),
        *(named[name] for name in kept if name in named),
    }


def shard(
    module: nn.Module, ranks: Ranks, device: torch.device, kept: Collection[str] = ()
) -> Parts:
    """Shard a model's blocks among all processes, and bring it to this process's device.

    Args:
        module: in memory or mapped, on the CPU; nothing is attached to it. Its parameters stop
            training.
        ranks: this process among the others.
        device: where it is to compute.
        kept: state names of parameters that train.

    Raises:
        InputError: it repeats no blocks, this torch cannot, or memory does not hold a part.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise InputError(
            f"torch {torch.__version__} shards no model of which some parameters stay whole",
            fix="install torch 2.8 or later, or give --shard never",
        )
    parts = require_parts(module, kept)
    require_room(parts, ranks, device)
    ignored = _held_whole(module, parts.blocks, kept)
    # Whole weights take their `requires_grad` from the shards once, before the first pass.
    module.requires_grad_(False)
    mesh = init_device_mesh(device.type, (ranks.count,))
    for block in parts.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
        mark_sharded(block)
    # The root has no parameters: it is where blocks share their streams, and fetch the next one.
    fully_shard(module, mesh=mesh, ignored_params=ignored)
    for tensor in (*ignored, *module.buffers()):
        tensor.data = tensor.data.to(device)
    return parts


def shard_pair(pair: Pair, ranks: Ranks, kept: Collection[str]) -> Pair:
    """Shard both models of a pair, or the module that is both in turn.

    Args:
        pair: opened with `sharded`, nothing attached.
        ranks: this process among the others.
        kept: state names of the student's parameters that train.

    Returns:
        The pair without the files' memory, of which each process has its part.

    Raises:
        InputError: as `shard`.
    """
    student, teacher = pair.student, pair.teacher
    assert student is not None  # a pair that learns has both
    assert teacher is not None
    shard(student.module, ranks, pair.placement.device, kept)
    if teacher.module is not student.module:
        shard(teacher.module, ranks, pair.placement.device)
    return replace(
        pair, student=replace(student, mapped=None), teacher=replace(teacher, mapped=None)
    )


def require_room(parts: Parts, ranks: Ranks, device: torch.device) -> None:
    """Check that memory holds a process's part.

    Raises:
        InputError: it does not; both numbers are said.
    """
    free, needed = available(device), parts.per_process(ranks.count)
    if device.type == "cpu":  # what stays whole stays mapped, and processes share the machine
        needed = (parts.divided // ranks.count + 2 * parts.largest) * ranks.count
    if free is not None and needed > free:
        whose = "the machine's processes take" if device.type == "cpu" else "a process takes"
        raise InputError(
            f"{whose} {byte_label(needed)} of sharded weights, and {byte_label(free)} are free",
            fix="start more processes on more GPUs, or give --dtype bf16"
            if device.type != "cpu"
            else "give --shard never: a CPU maps one base for all processes",
        )


def local_bytes(module: nn.Module) -> int:
    """Count the bytes of parameters that this process holds between two passes."""
    return sum(local(parameter).nbytes for parameter in module.parameters())


def is_sharded(module: nn.Module) -> bool:
    """Return whether a process holds parts of a module's parameters."""
    return any(hasattr(parameter, "to_local") for parameter in module.parameters())


def free(module: nn.Module) -> None:
    """Give the memory of a sharded module's parameters back; it cannot compute any more."""
    for parameter in module.parameters():
        if hasattr(parameter, "to_local"):
            local(parameter).untyped_storage().resize_(0)
        else:
            parameter.data = parameter.data.new_empty(0)


@contextmanager
def sharded_by_layers() -> Iterator[None]:
    """Name a model whose code reads a sharded weight where its layer does not compute.

    Raises:
        InputError: it does.
    """
    try:
        yield
    except RuntimeError as problem:
        if "DTensor" not in str(problem):
            raise
        raise InputError(
            "this model computes with a layer's weights outside the layer, where they are sharded:"
            f" {one_line(problem)}",
            fix="give --shard never: each process then holds the base",
        ) from problem
