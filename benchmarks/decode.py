"""Decoding and merging, side by side with the official NOLA code's way, torch and HF PEFT.

    python benchmarks/decode.py [--json FILE] [--threads N] [--no-stream]

Prints ratios first. Run it with `--threads 1` and without. The opponents:

- the official NOLA way: draw uniform(-1, 1) bases with a seeded torch generator, einsum, add;
- a plain torch LoRA merge of the same rank: `W += (B @ A * scaling).to(W.dtype)`;
- HF PEFT's RandLora layer: its own `get_delta_weight`;
- a plain file copy by the kernel, for the streaming merge.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, peak_memory

from kilodelta.verify.runners.timing import side_by_side

D = 4096
NOLA_RANK, NOLA_BASES = 8, 1024
RANDLORA_RANK = 32


def main() -> None:
    """Run everything and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-stream", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=2.1)
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    import threadpoolctl
    import torch

    torch.set_num_threads(options.threads)
    with threadpoolctl.threadpool_limits(options.threads):
        rows = [*nola(options.threads), *randlora(options.threads)]
        if not options.no_stream:
            rows += streaming(options.threads, options.gigabytes)
    report = {"machine": describe(), "threads": options.threads, "rows": rows}
    _print(report)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _print(report: dict[str, Any]) -> None:
    for name, value in report["machine"].items():
        print(f"{name:10} {value}")
    print(f"threads    {report['threads']}\n")
    print(f"{'ratio':>8}  {'kilodelta':>11}  {'opponent':>11}  what")
    for row in report["rows"]:
        ours, theirs = row["kilodelta"], row["opponent"]
        unit, factor = ("ms", 1e3) if row["unit"] == "s" else (row["unit"], 1)
        print(
            f"{row['ratio']:>7.2f}x  {ours * factor:>8.1f} {unit}  {theirs * factor:>8.1f} {unit}"
            f"  {row['what']}"
        )


def _row(what: str, ours: float, theirs: float, *, unit: str = "s") -> dict[str, Any]:
    return {
        "what": what,
        "kilodelta": ours,
        "opponent": theirs,
        "ratio": theirs / ours,
        "unit": unit,
    }


def nola(threads: int) -> list[dict[str, Any]]:
    """Mixing both factors, and the whole layer into bfloat16 weights."""
    import torch

    from kilodelta.exact.bases import Stream
    from kilodelta.format.methods.nola.spec import ROLE_A, ROLE_B
    from kilodelta.merging import cpu

    delta, target, weights = _one_layer()
    q = delta.coefficients(target.name)
    stream = Stream(7)
    floats = torch.randn(2, NOLA_BASES)
    tensor = torch.randn(D, D).to(torch.bfloat16)
    A, B = torch.randn(NOLA_RANK, D), torch.randn(D, NOLA_RANK)

    def mix() -> None:
        if threads == 1:
            stream.mix(ROLE_A, q["alpha"], range(NOLA_RANK), range(D))
            stream.mix(ROLE_B, q["beta"], range(D), range(NOLA_RANK))
        else:
            _all(
                [
                    lambda: stream.mix(ROLE_A, q["alpha"], range(NOLA_RANK), range(D)),
                    lambda: stream.mix(ROLE_B, q["beta"], range(D), range(NOLA_RANK)),
                ]
            )

    def official() -> tuple[Any, Any]:
        torch.manual_seed(7)
        U = torch.zeros(NOLA_BASES, NOLA_RANK, D).uniform_(-1, 1)
        right = torch.einsum("k,kij->ij", floats[0], U)
        torch.manual_seed(8)
        V = torch.zeros(NOLA_BASES, D, NOLA_RANK).uniform_(-1, 1)
        return torch.einsum("k,kij->ij", floats[1], V), right

    def official_layer() -> None:
        left, right = official()
        tensor.add_((left @ right / NOLA_BASES).to(tensor.dtype))

    def lora_merge() -> None:
        tensor.add_((B @ A * 1e-3).to(tensor.dtype))

    def layer() -> None:
        """As many layers at a time as there are threads."""
        _all([lambda: collections.deque(cpu.merged(delta, target, weights), 0)] * threads)

    factors = side_by_side({"ours": mix, "official": official}, repeats=5)
    whole = side_by_side({"ours": layer, "official": official_layer, "lora": lora_merge}, repeats=5)
    ours = whole["ours"] / threads
    shape = f"D = d = {D}, r = {NOLA_RANK}, k = {NOLA_BASES}"
    return [
        _row(f"NOLA mixing, {shape}: official NOLA in torch", factors["ours"], factors["official"]),
        _row(
            f"NOLA layer into bfloat16, {shape} (a layer a thread): official NOLA in torch",
            ours,
            whole["official"],
        ),
        _row(
            f"the same (a layer a thread): torch LoRA merge r = {NOLA_RANK}",
            ours,
            whole["lora"],
        ),
    ]


def _all(work: list[Any]) -> None:
    if len(work) == 1:
        work[0]()
        return
    running = [threading.Thread(target=one) for one in work]
    for one in running:
        one.start()
    for one in running:
        one.join()


def _one_layer() -> tuple[Any, Any, Any]:
    """A bound NOLA delta of one D x D bfloat16 tensor, its target and weights."""
    from safetensors.numpy import save_file

    from kilodelta.files.checkpoint import Checkpoint

    folder = Path(tempfile.mkdtemp())
    half = (np.random.default_rng(0).normal(size=(D, D)) * 0.02).astype(np.float32)
    save_file({"w": half}, folder / "f32.safetensors")
    _write_bfloat16(folder / "model.safetensors", {"w": half})
    checkpoint = Checkpoint.open(folder / "model.safetensors")
    delta = _nola_delta(checkpoint)
    weights = checkpoint.data("w").copy()
    shutil.rmtree(folder)
    return delta, delta.target("w"), weights


def _write_bfloat16(path: Path, tensors: dict[str, Any]) -> None:
    from kilodelta.files import safetensors
    from kilodelta.files.tensor import RawTensor

    def cut(tensor: Any) -> RawTensor:
        data = (tensor.view(np.uint32) >> 16).astype("<u2").reshape(-1).view(np.uint8)
        return RawTensor(dtype="BF16", shape=tensor.shape, data=data)

    safetensors.write(path, {name: cut(tensor) for name, tensor in tensors.items()})


def _nola_delta(checkpoint: Any, bases: int = NOLA_BASES) -> Any:
    from kilodelta.format.methods import Nola
    from kilodelta.format.targets import Patterns
    from kilodelta.merging import build

    rng = np.random.default_rng(1)
    method = Nola(rank=NOLA_RANK, bases=bases)
    patterns = Patterns(include=("*",))
    coefficients = {
        target.name: build.quantise_target(
            method, {g.name: rng.normal(size=g.shape) * 1e-4 for g in method.groups(target)}, 8
        )
        for target in build.targets(checkpoint, patterns)
    }
    return build.build(
        checkpoint, build.Recipe(method=method, patterns=patterns, seed=7), coefficients
    )


def randlora(threads: int) -> list[dict[str, Any]]:
    """dQ of one layer: by the int8 unit, by the float32 fallback, by PEFT."""
    import torch
    from peft import RandLoraConfig, get_peft_model

    from kilodelta.exact import products
    from kilodelta.exact.bases import Stream
    from kilodelta.format.methods import RandLora
    from kilodelta.format.quantise import quantise
    from kilodelta.format.targets import Target
    from kilodelta.merging.cpu import LARGE

    model = torch.nn.Sequential(torch.nn.Linear(D, D, bias=False))
    config = RandLoraConfig(r=RANDLORA_RANK, target_modules=["0"], randlora_alpha=1)
    layer = get_peft_model(model, config).base_model.model[0]
    method = RandLora(rank=RANDLORA_RANK)
    target = Target(name="w", dtype="F32", shape=(D, D), transposed=False, index=0)
    rng = np.random.default_rng(2)
    q = {g.name: quantise(rng.normal(size=g.shape), 8).q for g in method.groups(target)}
    stream = Stream(7)

    def expand(unit: Any) -> None:
        """All rows of dQ in the steps that a merge takes."""
        multiply = unit(method.right(q, target, stream), method.bound(q))
        step = LARGE // D
        for start in range(0, D, step):
            multiply(method.left(q, target, stream, range(start, start + step)))

    def peft() -> None:
        with torch.no_grad():
            layer.get_delta_weight("default")

    best = side_by_side(
        {
            "unit": lambda: expand(products._int8_unit()),
            "fallback": lambda: expand(products.by_float32),
            "peft": peft,
        },
        repeats=4,
    )
    shape = f"RandLoRA {D} x {D}, r = {RANDLORA_RANK}"
    chosen = products._int8_unit().__name__
    return [
        _row(f"{shape}, chosen unit {chosen}: PEFT get_delta_weight", best["unit"], best["peft"]),
        _row(f"{shape}, by_float32: PEFT get_delta_weight", best["fallback"], best["peft"]),
    ]


def streaming(threads: int, gigabytes: float) -> list[dict[str, Any]]:
    """Merge a checkpoint whose every matrix is a target, against a file copy, both synced."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("KILODELTA_BENCH")))
    try:
        _big_checkpoint(folder / "base.safetensors", gigabytes)
        return _stream_rows(folder, threads)
    finally:
        shutil.rmtree(folder)


def _big_checkpoint(path: Path, gigabytes: float) -> None:
    count = round(gigabytes * 1e9 / (2 * D * D))
    block = (np.random.default_rng(3).normal(size=(D, D)) * 0.02).astype(np.float32)
    _write_bfloat16(path, {f"layers.{i:03}.weight": block for i in range(count)})


def _stream_rows(folder: Path, threads: int) -> list[dict[str, Any]]:
    from kilodelta.files.checkpoint import Checkpoint

    base = folder / "base.safetensors"
    time.sleep(2.1)  # a file younger than two seconds is not remembered by the digest cache
    _nola_delta(Checkpoint.open(base), 256).save(folder / "task.kd")
    copies, merges, peaks = [], [], []
    for _ in range(3):
        copies.append(_timed_copy(base, folder / "copy.safetensors"))
        seconds, peak = _timed_merge(base, folder / "task.kd", folder / "out.safetensors", threads)
        merges.append(seconds)
        peaks.append(peak)
    size = f"{base.stat().st_size / 1e9:.1f} GB bfloat16, all {D} x {D} matrices touched"
    plain, synced = (min(c[i] for c in copies) for i in (0, 1))
    whole, before_sync = (min(m[i] for m in merges) for i in (0, 1))
    return [
        _row(f"streaming merge, {size}, digest proved: file copy", before_sync, plain),
        _row("the same, both with fsync", whole, synced),
        _row(
            "peak anonymous memory of the merge: the checkpoint",
            max(peaks) / 1e6,
            base.stat().st_size / 1e6,
            unit="MB",
        ),
    ]


def _timed_copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds to copy, and to copy and sync."""
    target.unlink(missing_ok=True)
    os.sync()
    began = time.perf_counter()
    shutil.copyfile(source, target)
    plain = time.perf_counter() - began
    with target.open("rb") as file:
        os.fsync(file.fileno())
    synced = time.perf_counter() - began
    target.unlink()
    return plain, synced


def _timed_merge(
    base: Path, delta: Path, out: Path, threads: int
) -> tuple[tuple[float, float], int]:
    """((seconds in all, seconds without fsync), peak anonymous bytes) in a fresh process."""
    out.unlink(missing_ok=True)
    os.sync()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_merge_child, args=(base, delta, out, threads, sender))
    process.start()
    found: tuple[tuple[float, float], int] = receiver.recv()
    process.join()
    return found


def _merge_child(base: Path, delta: Path, out: Path, threads: int, sender: Any) -> None:
    import kilodelta
    from kilodelta.exact.selftest import require_good_kernels
    from kilodelta.files.staging import publish

    require_good_kernels()  # compiled kernels come from the cache; their loading is not merging
    synced = [0.0]
    original = publish.sync

    def sync(path: Path) -> None:
        began = time.perf_counter()
        original(path)
        synced[0] += time.perf_counter() - began

    publish.sync = sync
    with peak_memory() as peak:
        began = time.perf_counter()
        kilodelta.merge(base, delta, out, threads=threads)
        seconds = time.perf_counter() - began
        sender.send(((seconds, seconds - synced[0]), peak()))


if __name__ == "__main__":
    main()
