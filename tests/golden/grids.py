"""Merges small quantised bases in the grid and prints every digest, to compare processors.

    python tests/golden/grids.py [--write FILE]
    bash tests/golden/aarch64.sh FOLDER      # the same on an emulated aarch64

Without `--write` the digests have to be those of `grids.json`, which x86-64 wrote. The bases are
drawn with `random`, whose numbers are the same on every machine, and no float is computed on the
way to them. There are rows of nibbles and other ones, groups that end within a kernel's tile, and
updates with few and with many inner dimensions.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
from collections import ChainMap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kilodelta
from kilodelta.files import safetensors
from kilodelta.files.tensor import RawTensor
from kilodelta.format.form import Form
from kilodelta.format.methods import Lora, Nola
from kilodelta.format.quantise import Quantised, Scale
from kilodelta.format.targets import Patterns
from kilodelta.grid import open_quantised
from kilodelta.merging.build import Recipe, build

EXPECTED = Path(__file__).with_name("grids.json")
PATTERNS = Patterns(include=("*.weight",))
NAMED = (("a", (16, 64)), ("b", (8, 4512)))
"""Both weights of a base; the second one is wider than a tile of any kernel."""


Base = tuple[dict[str, Any], dict[str, Any]]
"""A quantisation configuration, and the tensors."""
Case = Callable[["Drawn"], Base]


class Drawn:
    """Numbers from Python's generator, as arrays."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
        """Draw integers from `low` to below `high`."""
        count = int(np.prod(shape))
        return np.array([self._random.randrange(low, high) for _ in range(count)]).reshape(shape)

    def words(self, shape: tuple[int, ...]) -> npt.NDArray[np.int32]:
        """Draw 32-bit words."""
        return self.integers(0, 1 << 32, shape).astype(np.uint32).view(np.int32)

    def halves(self, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
        """Draw float16 of both signs with magnitudes from 2^-6 to 2^-2, and some zeros."""
        bits = self.integers(9 << 10, 13 << 10, shape) | (self.integers(0, 2, shape) << 15)
        bits[self.integers(0, 20, shape) == 0] &= 1 << 15
        return bits.astype(np.uint16).view(np.float16)


def pack_quantized(drawn: Drawn, name: str, out: int, in_: int, bits: int, group: int) -> Any:
    """Draw a weight of compressed-tensors' integers, with zero points."""
    groups = -(-in_ // group)
    return {
        f"{name}.weight_packed": drawn.words((out, -(-in_ * bits // 32))),
        f"{name}.weight_scale": drawn.halves((out, groups)),
        f"{name}.weight_shape": np.array([out, in_]),
        f"{name}.weight_zero_point": drawn.words((-(-out * bits // 32), groups)),
    }


def nvfp4(drawn: Drawn, name: str, out: int, in_: int) -> Any:
    """Draw a weight of ModelOpt's NVFP4."""
    return {
        f"{name}.weight": drawn.integers(0, 256, (out, in_ // 2)).astype(np.uint8),
        f"{name}.weight_scale": RawTensor(
            dtype="F8_E4M3",
            shape=(out, in_ // 16),
            data=drawn.integers(0, 0x7F, (out * in_ // 16,)).astype(np.uint8),
        ),
        f"{name}.weight_scale_2": np.array(2.0**-9, np.float32),
    }


def fp8(drawn: Drawn, name: str, out: int, in_: int) -> Any:
    """Draw a weight of fine-grained FP8."""
    return {
        f"{name}.weight": RawTensor(
            dtype="F8_E4M3",
            shape=(out, in_),
            data=drawn.integers(0, 0x7F, (out * in_,)).astype(np.uint8),
        ),
        f"{name}.weight_scale_inv": drawn.halves((-(-out // 128), -(-in_ // 128))).astype(
            np.float32
        ),
    }


def gptq(drawn: Drawn, name: str, out: int, in_: int) -> Any:
    """Draw a weight of GPTQ, four bits and groups of 32, its columns in another order."""
    order = np.array(drawn.integers(0, in_ // 32, (in_,)), np.int32)
    return {
        f"{name}.qweight": drawn.words((in_ // 8, out)),
        f"{name}.qzeros": drawn.words((in_ // 32, out // 8)),
        f"{name}.scales": drawn.halves((in_ // 32, out)),
        f"{name}.g_idx": order,
    }


def config(bits: int, group: int) -> dict[str, Any]:
    """Describe compressed-tensors' integers, as `config.json` does."""
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


def integers(bits: int, group: int) -> Case:
    """Draw a base of compressed-tensors' integers."""

    def draw(drawn: Drawn) -> Base:
        weights = (pack_quantized(drawn, n, *s, bits, group) for n, s in NAMED)
        return config(bits, group), dict(ChainMap(*weights))

    return draw


def of(quantisation: dict[str, Any], weight: Callable[..., Any]) -> Case:
    """Draw a base of one layout."""
    return lambda drawn: (quantisation, dict(ChainMap(*(weight(drawn, n, *s) for n, s in NAMED))))


CASES: dict[str, Case] = {
    **{
        f"int{bits} groups of {group}": integers(bits, group)
        for bits, group in ((4, 32), (4, 96), (4, 2), (3, 32), (8, 32))
    },
    "NVFP4": of({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
    "FP8": of({"quant_method": "fp8", "weight_block_size": [128, 128]}, fp8),
    "GPTQ": of({"quant_method": "gptq", "bits": 4, "group_size": 32}, gptq),
}
METHODS: dict[str, Form] = {
    "LoRA of rank 3": Lora(rank=3),
    "LoRA of rank 40": Lora(rank=40),
    "NOLA": Nola(rank=2, bases=16),
}


def delta(drawn: Drawn, base: Path, method: Form) -> kilodelta.Delta:
    """Draw a file for every weight of a base, its update about a step of the grid."""
    coefficients = {}
    for name, stored in open_quantised(base).stored.items():
        out, in_ = stored.shape
        shapes: dict[str, tuple[int, ...]] = {"alpha": (16,), "beta": (16,)}
        if isinstance(method, Lora):
            shapes = {"A": (method.rank, in_), "B": (out, method.rank)}
        coefficients[name] = {
            role: Quantised(q=drawn.integers(-7, 8, shape).astype(np.int16), scale=Scale(c=3, e=-7))
            for role, shape in shapes.items()
        }
    return build(base, Recipe(method=method, patterns=PATTERNS, bits=4, seed=7), coefficients)


def digests(work: Path, cases: Iterable[str] = CASES) -> dict[str, dict[str, str]]:
    """Merge bases with every method, in a folder; return the digests by case and method."""
    found = {}
    for case in cases:
        drawn, place = Drawn(case), work / case
        quantisation, tensors = CASES[case](drawn)
        place.mkdir()
        raw = {k: v if isinstance(v, RawTensor) else RawTensor.of(v) for k, v in tensors.items()}
        safetensors.write(place / "model.safetensors", raw)
        (place / "config.json").write_text(json.dumps({"quantization_config": quantisation}))
        for label, method in METHODS.items():
            file, merged = delta(drawn, place, method), work / f"{case} {label}"
            kilodelta.merge(place, file, merged, min_changed=0)
            grid = file.manifest.grid
            assert grid is not None
            found[f"{case}, {label}"] = {
                "base": file.manifest.base.root,
                "logical root": grid.logical,
                "in the grid": file.manifest.result,
                "beside": file.manifest.beside,
                "merged": kilodelta.digest(merged).root,
                "codes changed": str(file.manifest.made["grid_codes_changed"]),
            }
    return found


def main() -> None:
    """Compare with the committed digests, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", type=Path, help="write the digests here instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = digests(Path(folder))
    if options.write:
        options.write.write_text(json.dumps(found, indent=1) + "\n")
        return
    expected = json.loads(EXPECTED.read_text())
    wrong = sorted(c for c in expected.keys() | found.keys() if expected.get(c) != found.get(c))
    right = len(found) - len(wrong)
    print(f"{platform.machine()}: {right} of {len(expected)} merges have the digests of grids.json")
    for case in wrong:
        print(f"  {case}: {found.get(case)}, not {expected.get(case)}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
