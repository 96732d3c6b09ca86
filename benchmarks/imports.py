"""Imported adapters: bytes of the other tool's file against ours, and the time to merge one layer.

    python benchmarks/imports.py [--layers 28] [--json FILE]

A RandLora adapter of a 3B model's shape: q 3072 x 3072 and v 1024 x 3072 in every layer, r = 32. No
model of that size is made: PEFT's bytes follow from the shapes of what it saves, ours from a real
`.kd` written with random coefficients.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

from kilodelta.exact import ordered
from kilodelta.files.checkpoint import Checkpoint
from kilodelta.files.safetensors import header_bytes
from kilodelta.files.tensor import TensorInfo
from kilodelta.format.delta import Delta
from kilodelta.format.foreign import PeftRandLora, stored
from kilodelta.format.foreign.peft_randlora import digest, draw
from kilodelta.format.manifest import FLOATS, Base, Manifest
from kilodelta.format.targets import Patterns
from kilodelta.merging import cpu
from kilodelta.merging.build import Recipe, targets

RANK = 32
SHAPES = {"q_proj": (3072, 3072), "v_proj": (1024, 3072)}


def main() -> None:
    """Print ratios first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = [*sizes(options.layers), merging()]
    report = {"machine": describe(), "rows": rows}
    for name, value in describe().items():
        print(f"{name:10} {value}")
    print()
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def peft_bytes(layers: int, dtype_bytes: int = 4) -> tuple[int, int]:
    """(with projections, without) of PEFT's file: it saves the shared basis once for the model and
    once more for every layer, each name of the state dict being a tensor of its own."""
    large, small = max(map(max, SHAPES.values())), 3072
    basis = RANK * small + large * ceil(small / RANK) * RANK
    own = sum(RANK * ceil(min(s) / RANK) + ceil(min(s) / RANK) * min(s) for s in SHAPES.values())
    trained = 4 * layers * own
    return trained + dtype_bytes * basis * (layers * len(SHAPES) + 1), trained


def base_file(path: Path, layers: int) -> Checkpoint:
    """A sparse file of the base's shape: its bytes are zeros that take no disk."""
    order = [
        TensorInfo(name=f"layers.{i:02}.{name}.weight", dtype="BF16", shape=shape)
        for i in range(layers)
        for name, shape in SHAPES.items()
    ]
    header = header_bytes(order, {})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(info.nbytes for info in order))
    return Checkpoint.open(path)


def form() -> PeftRandLora:
    basis = draw("dense", "bfloat16", 0, RANK, 3072, 3072)
    return PeftRandLora(
        rank=RANK,
        alpha=640,
        basis="dense",
        dtype="bfloat16",
        small=3072,
        large=3072,
        fingerprint=digest(basis, "bfloat16"),
    )


def delta_of(checkpoint: Checkpoint, method: PeftRandLora, bits: int) -> Delta:
    """A delta with random coefficients, its result root left open: no size depends on it."""
    rng, patterns = np.random.default_rng(0), Patterns(include=("*",))
    layout = targets(checkpoint, patterns)
    groups = [group for target in layout for group in method.groups(target)]
    packed = [
        stored.pack(1e-3 * rng.standard_normal(group.shape, np.float32), FLOATS[bits])
        for group in groups
    ]
    root = "sha256:" + "0" * 64
    recipe = Recipe(method=method, patterns=patterns, bits=bits)
    manifest = Manifest(
        base=Base(name="3B", root=root, tensors=len(checkpoint.names)),
        method=recipe.method,
        seed=0,
        patterns=patterns,
        count=len(layout),
        bits=bits,
        scales=(),
        extras=(),
        result=root,
    )
    return Delta(manifest=manifest, blob=np.concatenate(packed)).bind(checkpoint)


def sizes(layers: int) -> list[dict[str, Any]]:
    """One row a type of the coefficients."""
    whole, trained = peft_bytes(layers)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = base_file(Path(folder) / "base.safetensors", layers)
        for bits, name in FLOATS.items():
            ours = delta_of(checkpoint, form(), bits).save(Path(folder) / f"{bits}.kd")
            rows.append(
                {
                    "ratio": f"{whole / ours:.1f}x",
                    "what": f"PEFT's file with projections over a .kd with {name} coefficients",
                    "peft_bytes": whole,
                    "peft_bytes_without_projections": trained,
                    "kd_bytes": ours,
                }
            )
    return rows


def merging() -> dict[str, Any]:
    """Processor seconds of one q of 3072 x 3072, one thread: our merge by the ordered sum, and the
    float32 BLAS product alone that PEFT makes. Set OMP_NUM_THREADS=1."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = base_file(Path(folder) / "base.safetensors", 1)
        delta = delta_of(checkpoint, form(), 32)
        target = next(iter(delta.targets.values()))
        assert delta.manifest.compat is not None
        q, method = delta.coefficients(target.name), delta.manifest.compat
        left = method.left(q, target, delta.stream, range(target.matrix[0]))
        right = method.right(q, target, delta.stream)
        data = checkpoint.data(target.name)
        ordered.multiplier(right[:, :8])(left[:8])  # compiled before the clock runs
        began = time.process_time()
        for _ in cpu.merged(delta, target, data):
            pass
        ours = time.process_time() - began
        began = time.process_time()
        left @ right
        theirs = time.process_time() - began
    return {
        "ratio": f"{theirs / ours:.2f}x",
        "what": "float32 BLAS product alone over our whole merge of one 3072 x 3072, ordered sum",
        "blas_seconds": round(theirs, 3),
        "kilodelta_seconds": round(ours, 3),
    }


if __name__ == "__main__":
    main()
