"""Part one of a GPU's proof: merges on it equal the CPU's, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from kilodelta.export.merge.checkpoint import merge
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.format.delta import Delta
from kilodelta.format.methods import Method, Nola, RandLora
from kilodelta.format.targets import Patterns
from kilodelta.merging import cpu
from kilodelta.merging.gpu import stream
from kilodelta.verify.gpu import synthetic
from kilodelta.verify.gpu.part import PartRow, Setting
from kilodelta.verify.parity.result import FAILED, PASSED

PROJECTIONS = Patterns(include=("*_proj.weight",))


def exact(setting: Setting) -> Iterator[PartRow]:
    """Try every method on small tensors of every dtype, then merge a model of a billion weights."""
    base = synthetic.write(setting.folder / "small.safetensors", synthetic.SMALL)
    for method in synthetic.methods():
        for bits in method.bits:
            yield _small(Checkpoint.open(base), synthetic.delta(base, method, bits=bits), setting)
    yield from _large(setting)


def _small(checkpoint: Checkpoint, delta: Delta, setting: Setting) -> PartRow:
    bound, device = delta.bind(checkpoint), torch.device(setting.device)
    wrong = []
    for target in bound.targets.values():
        data = checkpoint.data(target.name)
        expected = b"".join(part.tobytes() for part in cpu.merged(bound, target, data))
        merged_bytes = b"".join(
            part.tobytes() for part in stream.merged(bound, target, data, device, 1 << 16)
        )
        if merged_bytes != expected:
            wrong.append(target.name)
    text = f"differs in {', '.join(wrong)}" if wrong else f"{len(bound.targets)} tensors equal"
    return PartRow(
        what=f"{_name(delta.method)} {delta.manifest.bits} bits",
        found=text,
        status=FAILED if wrong else PASSED,
    )


def _name(method: Method) -> str:
    return f"{method.name}{' ternary' if getattr(method, 'sparsity', 0) else ''} r={method.rank}"


def _large(setting: Setting) -> Iterator[PartRow]:
    """Merge a whole file; the CPU has put the digest into the delta, and a wrong one raises."""
    shape = (1, 64, 176) if setting.small else (20, 2048, 8192)
    base = synthetic.write(setting.folder / "large.safetensors", synthetic.llama(*shape))
    for method in (Nola(rank=8, bases=1024), RandLora(rank=32)):
        delta = synthetic.delta(base, method, PROJECTIONS)
        out = setting.folder / f"{method.name}.safetensors"
        began = time.perf_counter()
        done = merge(base, delta, out, device=setting.device)
        seconds = time.perf_counter() - began
        out.unlink()
        yield PartRow(
            what=f"{_name(method)}, {done.targets} tensors, {done.nbytes / 1e9:.1f} GB",
            found=f"{done.result[:19]} as the CPU's, {seconds:.1f} s with writing and hashing",
        )
