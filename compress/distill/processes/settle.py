"""Settle what several processes decide of a compression's options, before models are opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kilodelta.compress.distill.options import Options
from kilodelta.compress.distill.placement import choose_placement, wants_shards
from kilodelta.compress.distill.processes.launch import check_share, device_of
from kilodelta.compress.distill.processes.ranks import Ranks
from kilodelta.errors import InputError
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.grid.open import is_quantised


def for_processes(options: Options, base: Path, ranks: Ranks, *, learns: bool) -> Options:
    """Settle which device a process among several computes on, and whether it holds a part.

    Args:
        options: how the user wants it.
        base: the base's files.
        ranks: this process among the others.
        learns: whether there are inputs to learn from; without them nothing is sharded.

    Returns:
        The options with this process's device; `shard` is `always` or `never` where inputs are
        learnt from by several.

    Raises:
        InputError: the options and the number of processes do not go together.
    """
    fix = "start it by torchrun --standalone --nproc-per-node=N -m kilodelta ..."
    check_together(options, base, ranks, fix=fix)
    if ranks.count == 1:
        return options
    options = replace(options, device=device_of(ranks, options.device))
    if options.shard == "auto" and learns and not options.precisions:
        files = Checkpoint.open(base)
        placement = choose_placement(options.device, options.dtype, files)
        options = replace(options, shard="always" if wants_shards(files, placement) else "never")
    return options


def check_together(options: Options, base: Path, ranks: Ranks, *, fix: str) -> None:
    """Check that the options and the number of processes go together.

    Args:
        options: how the user wants it.
        base: the base's files.
        ranks: one of the processes, which may be planned ones.
        fix: how several processes are had.

    Raises:
        InputError: they do not.
    """
    check_share(ranks, options.batch, quantised=ranks.count > 1 and is_quantised(base))
    if options.shard == "always" and ranks.count == 1:
        raise InputError("--shard always needs several processes to divide the base among", fix=fix)
    if options.shard == "always" and options.precisions:
        raise InputError(
            f"--for {','.join(options.precisions)} rounds whole weights, which no process holds"
            " where the base is sharded",
            fix="leave --for away, or give --shard never",
        )
