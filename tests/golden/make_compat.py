"""Makes the golden files of the compatibility forms by scalar code alone.

    python tests/golden/make_compat.py 0.2.0

Plain Python: its own MT19937, its own rounding by struct, every formula as loops in the order that
docs/format.md, section 9, gives. Of the package only `kilodelta.exact.reference` takes part.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from math import ceil, fsum, prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from make import Numbers, canonical, container, digest, root  # type: ignore[import-not-found]

from kilodelta.exact import reference

KEY = 0x1_0000_002A
BASE: dict[str, tuple[str, tuple[int, ...]]] = {
    "h.c_attn.weight": ("F16", (4, 12)),
    "norm.bias": ("F32", (4,)),
    "tall.weight": ("BF16", (11, 4)),
    "wide.weight": ("F32", (3, 10)),
}
LARGE, SMALL, RANK = 12, 10, 2
"""The largest out and in of the targets, seen as (out, in): (12, 4), (11, 4), (3, 10)."""
CASES: dict[str, dict[str, Any]] = {
    "randlora-bfloat16": {"basis": "dense", "dtype": "bfloat16"},
    "randlora-float16": {"basis": "dense", "dtype": "float16"},
    "randlora-sparse": {"basis": "sparse", "dtype": "float32"},
    "randlora-very-sparse": {"basis": "very-sparse", "dtype": "float32"},
    "randlora-stored": {"basis": "stored", "dtype": "bfloat16"},
    "nola-plain": {"layout": "plain", "start": "A"},
    "nola-gpt2": {"layout": "gpt2", "start": "both"},
}
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Mersenne:
    """MT19937, and PyTorch's way from its words to uniform numbers."""

    def __init__(self, seed: int) -> None:
        self.state = [seed & 0xFFFFFFFF]
        for i in range(1, 624):
            last = self.state[-1]
            self.state.append((1812433253 * (last ^ last >> 30) + i) & 0xFFFFFFFF)
        self.place = 624

    def word(self) -> int:
        if self.place == 624:
            for i in range(624):
                y = self.state[i] & 0x80000000 | self.state[(i + 1) % 624] & 0x7FFFFFFF
                self.state[i] = self.state[(i + 397) % 624] ^ y >> 1 ^ (0x9908B0DF if y & 1 else 0)
            self.place = 0
        y = self.state[self.place]
        self.place += 1
        y ^= y >> 11
        y ^= y << 7 & 0x9D2C5680
        y ^= y << 15 & 0xEFC60000
        return y ^ y >> 18

    def unit(self) -> float:
        return (self.word() & 0xFFFFFF) / 2**24

    def uniform(self, count: int, bound: float, dtype: str) -> list[float]:
        low, high = f32(-bound), f32(bound)
        drawn = [narrow(f32(self.unit() * f32(high - low) + low), dtype) for _ in range(count)]
        return [-y if y == narrow(high, dtype) else y for y in drawn]


def f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def narrow(value: float, dtype: str) -> float:
    return float(reference.widen(dtype, reference.round_to(dtype, np.float32(value))))


def words(values: list[float], dtype: str) -> bytes:
    bits = [reference.round_to(dtype, np.float32(value)) for value in values]
    return struct.pack(f"<{len(bits)}{'I' if dtype == 'F32' else 'H'}", *bits)


def deviation(values: list[float]) -> float:
    mean = fsum(values) / len(values)
    return sqrt(fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def dense(dtype: str) -> tuple[list[float], list[float]]:
    """A (r, m) and B (M, n, r), flat."""
    mersenne, n = Mersenne(KEY), ceil(SMALL / RANK)
    A = mersenne.uniform(RANK * SMALL, sqrt(3.0) * (sqrt(2.0 / 6.0) / sqrt(SMALL)), dtype)
    bound = sqrt(3.0) * (sqrt(2.0 / 6.0) / sqrt(RANK))
    parts = [mersenne.uniform(LARGE * RANK, bound, dtype) for _ in range(n)]
    B = [parts[j][i * RANK + p] for i in range(LARGE) for j in range(n) for p in range(RANK)]
    return divided(A, dtype), divided(B, dtype)


def divided(values: list[float], dtype: str) -> list[float]:
    divisor = narrow(f32(deviation(values)), dtype)
    return [narrow(f32(value / divisor), dtype) for value in values]


def sparse(s: float) -> tuple[list[float], list[float]]:
    mersenne = Mersenne(KEY)
    found = []
    for count in (RANK * SMALL, LARGE * ceil(SMALL / RANK) * RANK):
        low, high = f32(1 / (2 * s)), f32(1 - 1 / (2 * s))
        units = [mersenne.unit() for _ in range(count)]
        signs = [float(u > high) - float(u < low) for u in units]
        found.append([f32(v / f32(deviation(signs))) for v in signs])
    return found[0], found[1]


def basis_of(case: dict[str, Any]) -> tuple[list[float], list[float]]:
    if case["basis"] == "stored":
        numbers, n = Numbers(77), ceil(SMALL / RANK)
        counts = RANK * SMALL, LARGE * n * RANK
        A, B = ([(numbers.below(65) - 32) / 16 for _ in range(count)] for count in counts)
        return A, B
    if case["basis"] == "dense":
        return dense(TYPES[case["dtype"]])
    return sparse(3.0 if case["basis"] == "sparse" else sqrt(SMALL))


def floats(numbers: Numbers, count: int) -> list[float]:
    return [f32((numbers.below(20001) - 10000) / 65536) for _ in range(count)]


def product(left: list[list[float]], right: list[list[float]]) -> list[list[float]]:
    """Each element summed over the inner index in ascending order, in float64."""
    found = []
    for row in left:
        sums = []
        for column in range(len(right[0])):
            total = 0.0
            for k, value in enumerate(row):
                total += value * right[k][column]
            sums.append(total)
        found.append(sums)
    return found


def randlora(
    case: dict[str, Any], numbers: Numbers, out: int, in_: int
) -> tuple[bytes, list[list[float]]]:
    """One target's bytes in the blob, and its product (out, in) before the scale."""
    A, B = basis_of(case)
    m, M, n_all = min(out, in_), max(out, in_), ceil(SMALL / RANK)
    n = ceil(m / RANK)
    lambda_, gamma = floats(numbers, RANK * n), floats(numbers, n * m)
    L = [
        [f32(f32(lambda_[p * n + j] * A[p * SMALL + c]) * gamma[j * m + c]) for c in range(m)]
        for p in range(RANK)
        for j in range(n)
    ]
    Bhat = [
        [B[(i * n_all + j) * RANK + p] for j in range(n) for p in range(RANK)] for i in range(M)
    ]
    whole = product(Bhat, L)
    if out < in_:
        whole = [[whole[i][c] for i in range(M)] for c in range(m)]
    return words(lambda_, "F32") + words(gamma, "F32"), whole


def nola(
    case: dict[str, Any], numbers: Numbers, out: int, in_: int
) -> tuple[bytes, list[list[float]]]:
    fused = case["layout"] == "gpt2" and out == 3 * in_
    spans = [(0, in_), (2 * in_, out)] if fused else [(0, out)]
    height, k = spans[0][1] - spans[0][0], 5
    seeds = [[numbers.below(2**31) * 7, numbers.below(2**31) * 5] for _ in spans]
    alpha, beta = ([floats(numbers, k) for _ in spans] for _ in range(2))
    A0 = [floats(numbers, RANK * in_) for _ in spans]
    with_b = case["start"] == "both"
    B0 = [floats(numbers, height * RANK) if with_b else [0.0] * (height * RANK) for _ in spans]
    left = [[0.0] * (RANK * len(spans)) for _ in range(out)]
    right: list[list[float]] = []
    prints = b""
    for s, (first, _) in enumerate(spans):
        A, print_a = factor(alpha[s], seeds[s][0], A0[s])
        Bs, print_b = factor(beta[s], seeds[s][1], B0[s])
        prints += print_a + print_b
        right += [A[p * in_ : (p + 1) * in_] for p in range(RANK)]
        for i in range(height):
            for p in range(RANK):
                left[first + i][s * RANK + p] = Bs[i * RANK + p]
    flat = [alpha, beta, A0, *([B0] if with_b else [])]
    data = struct.pack(f"<{2 * len(spans)}q", *(x for pair in seeds for x in pair)) + prints
    data += b"".join(words(part, "F32") for group in flat for part in group)
    return data, product(left, right)


def factor(c: list[float], seed: int, start: list[float]) -> tuple[list[float], bytes]:
    mersenne = Mersenne(seed)
    U = [mersenne.uniform(len(start), 1.0, "F32") for _ in c]
    found = []
    for x, first in enumerate(start):
        total = 0.0
        for i, value in enumerate(c):
            total += value * U[i][x]
        found.append(f32(total * (1.0 / sqrt(len(c))) + first))
    return found, hashlib.sha256(b"".join(words(u, "F32") for u in U)).digest()


def base_tensors() -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    numbers, found = Numbers(2), {}
    for name, (dtype, shape) in BASE.items():
        values = [(numbers.below(4001) - 2000) / 8192 for _ in range(prod(shape))]
        found[name] = (dtype, shape, words(values, dtype))
    return found


def merged(
    tensor: tuple[str, tuple[int, ...], bytes], turned: bool, change: list[list[float]]
) -> bytes:
    dtype, (rows, columns), data = tensor[0], tensor[1], tensor[2]
    size, found = 4 if dtype == "F32" else 2, bytearray()
    for at in range(rows * columns):
        r, c = divmod(at, columns)
        bits = int.from_bytes(data[at * size : (at + 1) * size], "little")
        step = np.float32(change[c][r] if turned else change[r][c])
        y = np.float32(reference.widen(dtype, bits) + step)
        found += reference.round_to(dtype, y).to_bytes(size, "little")
    return bytes(found)


def method_of(name: str) -> dict[str, Any]:
    case = CASES[name]
    if "layout" in case:
        return {"name": "official-nola", "rank": RANK, "bases": 5, "alpha": 3.0, **case}
    state = hashlib.sha256(b"".join(words(part, TYPES[case["dtype"]]) for part in basis_of(case)))
    sizes = {"small": SMALL, "large": LARGE, "fingerprint": f"sha256:{state.hexdigest()}"}
    return {"name": "peft-randlora", "rank": RANK, "alpha": 7, **case, **sizes}


def make_case(
    name: str, base: dict[str, tuple[str, tuple[int, ...], bytes]]
) -> tuple[bytes, dict[str, Any]]:
    """A file's bytes, and what a reader must find in it."""
    case, method, numbers, blob = CASES[name], method_of(name), Numbers(sum(name.encode())), b""
    if case.get("basis") == "stored":
        blob = b"".join(words(part, TYPES[case["dtype"]]) for part in basis_of(case))
    expected, digests = {}, []
    for target in [n for n in sorted(base) if len(base[n][1]) == 2]:
        dtype, shape, _ = base[target]
        turned = target.startswith("h.")
        out, in_ = shape[::-1] if turned else shape
        data, whole = (nola if "layout" in case else randlora)(case, numbers, out, in_)
        scaling = method["alpha"] / RANK
        change = [[f32(value * scaling) for value in row] for row in whole]
        result = merged(base[target], turned, change)
        blob += data
        digests.append(digest(target, dtype, shape, result))
        expected[target] = {"update": change, "merged": result.hex()}
    file = in_container(method, blob, base, root(digests), len(expected))
    return file, {"result": root(digests), "targets": expected}


def in_container(
    method: dict[str, Any],
    blob: bytes,
    base: dict[str, tuple[str, tuple[int, ...], bytes]],
    result: str,
    count: int,
) -> bytes:
    manifest = {
        "version": 1,
        "base": {
            "name": "golden",
            "root": root([digest(n, *base[n]) for n in sorted(base)]),
            "tensors": len(base),
        },
        "method": method,
        "seed": str(KEY if method["name"] == "peft-randlora" else 0),
        "targets": {"include": ["*.weight"], "exclude": [], "transposed": ["h.*"], "count": count},
        "coefficients": {"dtype": "F32"},
        "extras": ["norm.bias"],
        "result": {"root": result},
        "made": {"tool": "golden"},
    }
    extra = struct.pack("<4f", 0.5, -1.0, 2.0, 0.25)
    tensors: list[tuple[str, str, tuple[int, ...], bytes]] = [
        ("extra.norm.bias", "F32", (4,), extra),
        ("coefficients", "U8", (len(blob),), blob),
    ]
    text = canonical(manifest)
    inside = root([digest(*tensor) for tensor in sorted(tensors)])
    whole = "sha256:" + hashlib.sha256(text.encode() + b"\0" + inside.encode()).hexdigest()
    file: bytes = container(tensors, {"kilodelta": text, "kilodelta.digest": whole})
    return file


def main() -> None:
    folder = Path(__file__).parent / sys.argv[1]
    folder.mkdir()
    base = base_tensors()
    tensors: list[Any] = [(n, *base[n]) for n in base]
    (folder / "base.safetensors").write_bytes(container(tensors, {"format": "pt"}))
    for name in CASES:
        file, expected = make_case(name, base)
        (folder / f"{name}.kd").write_bytes(file)
        (folder / f"{name}.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
